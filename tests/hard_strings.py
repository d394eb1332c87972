"""Strings that tokenizers get wrong, the same ones for every seed, Python and machine.

Every Unicode script, emoji sequences, runs of white space, digits, code, special tokens, and their
mixtures. The ranges are written out because Python's own Unicode tables differ by version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# The largest runs of each script of Unicode 16, hexadecimal.
_SCRIPTS = """
Adlam:1e900-1e94b Ahom:11700-1171a Anatolian_Hieroglyphs:14400-14646
Arabic:620-64a,671-6d3,fb50-fd3d,fd40-fdcf,fe76-fefc Armenian:558-58f Avestan:10b00-10b35
Balinese:1b00-1b4c Bamum:16800-16a38 Bassa_Vah:16ad0-16aed Batak:1bc0-1bf3 Bengali:9e6-9fe
Bhaiksuki:11c0a-11c36 Bopomofo:3105-312f Brahmi:11000-1104d Braille:2800-28ff Buginese:1a00-1a1b
Buhid:1740-1753 Canadian_Aboriginal:1400-167f Carian:102a0-102d0 Caucasian_Albanian:10530-10563
Chakma:11100-11134 Cham:aa00-aa36 Cherokee:13a0-13f5 Chorasmian:10fb0-10fcb Coptic:2c80-2cf3
Cuneiform:12000-12399 Cypriot:1080a-10835 Cypro_Minoan:12f90-12ff2
Cyrillic:400-484,487-52f,a640-a69f Deseret:10400-1044f Devanagari:900-950
Dives_Akuru:11918-11935 Dogra:11800-1183b Duployan:1bc00-1bc6a Egyptian_Hieroglyphs:13460-143fa
Elbasan:10500-10527 Elymaic:10fe0-10ff6 Ethiopic:1200-1248 Georgian:10d0-10fa
Glagolitic:2c00-2c5f Gothic:10330-1034a Grantha:11313-11328
Greek:3a3-3e1,10140-1018e,1d200-1d245 Gujarati:a93-aa8 Gunjala_Gondi:11d6a-11d8e
Gurmukhi:a13-a28 Han:4e00-9fff,20000-2a6df,31350-33479 Hangul:1100-11ff,3131-318e,ac00-d7a3
Hanifi_Rohingya:10d00-10d27 Hanunoo:1720-1734 Hatran:108e0-108f2 Hebrew:591-5c9
Hiragana:1b001-1b11f Imperial_Aramaic:10840-10855 Inscriptional_Pahlavi:10b60-10b72
Inscriptional_Parthian:10b40-10b55 Javanese:a980-a9cd Kaithi:11080-110c2 Kannada:c92-ca8
Katakana:30a1-30fa Kawi:11f12-11f3a Kayah_Li:a900-a92d Kharoshthi:10a19-10a35
Khitan_Small_Script:18b00-18cda Khmer:1780-17dd Khojki:11213-11241 Khudawadi:112b0-112ea
Lao:e8c-ea3 Latin:f8-2b8,1e00-1eff,1df00-1df81 Lepcha:1c00-1c37 Limbu:1900-191e
Linear_A:10600-10736 Linear_B:10080-100fa Lisu:a4d0-a4ff Lycian:10280-1029c Lydian:10920-10939
Mahajani:11150-11176 Makasar:11ee0-11ef8 Malayalam:d12-d44 Mandaic:840-85b
Manichaean:10ac0-10ae6 Marchen:11c70-11c8f Masaram_Gondi:11d0b-11d36 Medefaidrin:16e40-16e9a
Meetei_Mayek:abc0-abed Mende_Kikakui:1e800-1e8c4 Meroitic_Cursive:109d2-109ff
Meroitic_Hieroglyphs:10980-1099f Miao:16f00-16f4a Modi:11600-11644 Mongolian:1820-1878
Mro:16a40-16a5e Multani:1128f-1129d Myanmar:1000-109f Nabataean:10880-1089e
Nag_Mundari:1e4d0-1e4f9 Nandinagari:119aa-119d7 New_Tai_Lue:1980-19ab Newa:11400-1145b
Nko:7c0-7fa Nushu:1b170-1b2fb Nyiakeng_Puachue_Hmong:1e100-1e12c Ogham:1680-169c
Ol_Chiki:1c50-1c7f Old_Hungarian:10c80-10cb2 Old_Italic:10300-10323
Old_North_Arabian:10a80-10a9f Old_Permic:10350-1037a Old_Persian:103a0-103c3
Old_Sogdian:10f00-10f27 Old_South_Arabian:10a60-10a7f Old_Turkic:10c00-10c48
Old_Uyghur:10f70-10f89 Oriya:b13-b28 Osage:104b0-104d3 Osmanya:10480-1049d
Pahawh_Hmong:16b00-16b45 Palmyrene:10860-1087f Pau_Cin_Hau:11ac0-11af8 Phags_Pa:a840-a877
Phoenician:10900-1091b Psalter_Pahlavi:10b80-10b91 Rejang:a930-a953 Runic:16a0-16ea
Samaritan:800-82d Saurashtra:a880-a8c5 Sharada:11180-111df Shavian:10450-1047f
Siddham:11580-115b5 SignWriting:1d800-1da8b Sinhala:d9a-db1 Sogdian:10f30-10f59
Sora_Sompeng:110d0-110e8 Soyombo:11a50-11aa2 Sundanese:1b80-1bbf Syloti_Nagri:a800-a82c
Syriac:70f-74a Tagalog:1700-1715 Tagbanwa:1760-176c Tai_Le:1950-196d Tai_Tham:1a20-1a5e
Tai_Viet:aa80-aac2 Takri:11680-116b9 Tamil:11fc0-11ff1 Tangsa:16a70-16abe Tangut:17000-18aff
Telugu:c12-c28 Thaana:780-7b1 Thai:e01-e3a Tibetan:f00-f47 Tifinagh:2d30-2d67
Tirhuta:11480-114c7 Toto:1e290-1e2ae Ugaritic:10380-1039d Vai:a500-a62b Vithkuqi:1057c-1058a
Wancho:1e2c0-1e2f9 Warang_Citi:118a0-118f2 Yezidi:10e80-10ea9 Yi:a000-a48c
Zanabazar_Square:11a00-11a47 Garay:10d40-10d65 Gurung_Khema:16100-16139 Kirat_Rai:16d40-16d79
Ol_Onal:1e5d0-1e5fa Sunuwar:11bc0-11be1 Todhri:105c0-105f3 Tulu_Tigalari:11390-113b5
"""
SCRIPTS = {
    name: [tuple(int(end, 16) for end in run.split("-")) for run in runs.split(",")]
    for name, runs in (entry.split(":") for entry in _SCRIPTS.split())
}

_SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
]
_SPACES += ["\u2028", "\u0085", "\x0b", "\x0c", "\u1680", "\ufeff", "\u202f", "\u180e", "\x1c"]
_EMOJI = [chr(code) for code in (*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F6D8))]
_EMOJI += [chr(code) for code in (*range(0x1F900, 0x1FA00), *range(0x2600, 0x27C0))]
_SKIN = [chr(code) for code in range(0x1F3FB, 0x1F400)]
_FLAGS = [chr(code) for code in range(0x1F1E6, 0x1F200)]
_MARKS = [chr(code) for code in (*range(0x300, 0x370), *range(0x20D0, 0x20E1))]
_CONTRACTIONS = [
    "'s",
    "'S",
    "'t",
    "'re",
    "'RE",
    "'Ve",
    "'m",
    "'ll",
    "'LL",
    "'d",
    "\u2019s",
    "''s",
    "'x",
]
_WORDS = ["the", "of", "and", "Hello", "WORLD", "naïve", "straße", "İstanbul", "ﬁn", "ǅ", "Ωmega"]
_WORDS += ["mañana", "don't", "I'LL", "we'Ve", "x_y", "fooBar", "q'ſ"]
_DIGITS = [
    "0",
    "1",
    "42",
    "123",
    "1234",
    "3.14159",
    "1e-9",
    "１２３",
    "٣٤٥",
    "²³",
    "½",
    "Ⅻ",
    "१२३४",
]
_CODE = [
    "def f(x):\n    return x**2  # done\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
    '<a href="x">&nbsp;</a>',
    "SELECT * FROM t WHERE a='b';",
    '{"a": [1, 2.5, null], "b\\n": "\\u00e9"}',
    "\\begin{align} \\alpha &= \\frac{1}{2} \\end{align}",
    "$ ls -la | grep '^d' >> /tmp/out 2>&1",
    "https://example.com/a?b=c&d=%20#e",
    "====----++++////\\\\####",
    "!=<=>=->=>::...;;??!!",
]


def hard_strings(
    count: int = 10_000, *, special_tokens: Sequence[str] = (), seed: int = 0
) -> list[str]:
    """Hard strings, each script at least once.

    Args:
        count: how many.
        special_tokens: texts of special tokens to put in some, whole and broken.
        seed: the same seed gives the same strings.
    """
    rng = random.Random(seed)
    makers: list[Callable[[random.Random], str]] = [_spaces, _emoji, _digits, _words, _code, _any]
    if special_tokens:
        makers.append(lambda rng: _special(rng, special_tokens))
    strings = ["", " ", "\n", "a", "\x00", "\U0010ffff", "\ufffd"]
    strings += [_script(rng, name) for name in SCRIPTS]
    while len(strings) < count:
        parts = [rng.choice([*makers, _scripts])(rng) for _ in range(rng.randint(1, 5))]
        strings.append(rng.choice(["", "", " ", "\n"]).join(parts))
    return strings[:count]


def _many(rng: random.Random, choices: Sequence[str], low: int, high: int) -> str:
    return "".join(rng.choice(choices) for _ in range(rng.randint(low, high)))


def _script(rng: random.Random, name: str) -> str:
    runs = SCRIPTS[name]
    letters = [chr(rng.randint(*rng.choice(runs))) for _ in range(rng.randint(1, 12))]
    places = rng.randint(0, 2)
    for _ in range(places):
        letters.insert(
            rng.randint(0, len(letters)), rng.choice([" ", "\u0301", "\u200d", "'", "1"])
        )
    return "".join(letters)


def _scripts(rng: random.Random) -> str:
    names = list(SCRIPTS)
    return "".join(_script(rng, rng.choice(names)) for _ in range(rng.randint(1, 3)))


def _spaces(rng: random.Random) -> str:
    run = rng.choice(_SPACES) * rng.choice([1, 2, 3, 4, 7, 8, 16, 17, 40])
    return run + _many(rng, _SPACES, 0, 4) + rng.choice(["", "a", "1", ".", "é"])


def _emoji(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:  # joined, as families are
        return "\u200d".join(rng.choice(_EMOJI) for _ in range(rng.randint(2, 4)))
    if kind == 1:
        return _many(rng, _FLAGS, 1, 4)
    if kind == 2:
        return rng.choice(_EMOJI) + rng.choice(_SKIN) + rng.choice(["", "\ufe0f", "\u20e3"])
    return _many(rng, _EMOJI, 1, 3)


def _digits(rng: random.Random) -> str:
    number = str(rng.randrange(10 ** rng.randint(1, 20)))
    return rng.choice([number, f"{int(number):,}", "0" + number, _many(rng, _DIGITS, 1, 3)])


def _words(rng: random.Random) -> str:
    words = [
        rng.choice(_WORDS) + rng.choice(["", *_CONTRACTIONS]) for _ in range(rng.randint(1, 5))
    ]
    text = rng.choice([" ", "  ", "-", "\t"]).join(words)
    place = rng.randint(0, len(text))
    return text[:place] + _many(rng, _MARKS, 0, 2) + text[place:]


def _code(rng: random.Random) -> str:
    code = rng.choice(_CODE)
    return code[rng.randrange(len(code)) :] if rng.random() < 0.3 else code


def _any(rng: random.Random) -> str:
    """Any code points at all but surrogates: unassigned and private ones, controls."""
    codes = [rng.choice([rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x110000)])]
    codes += [rng.randrange(0x20000) for _ in range(rng.randint(0, 6))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _special(rng: random.Random, tokens: Sequence[str]) -> str:
    token = rng.choice(tokens)
    broken = token[: rng.randint(1, len(token))]
    return rng.choice([token, token, token * 2, f" {token} ", token + "\n", broken, token.upper()])
