"""A reader of compressed-tensors directories, written from the specification: no code of ours."""

import json

import numpy as np


def read_raw(path):
    """Header and tensors of a safetensors file, by its format."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    dtypes = {"I8": "i1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
              "F8_E4M3": "u1"}  # fmt: skip
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found = np.frombuffer(raw[8 + size + start : 8 + size + end], dtypes[entry["dtype"]])
            if entry["dtype"] == "F8_E4M3":
                found = float8_of(found)
            if entry["dtype"] == "BF16":
                found = (found.astype("<u4") << 16).view("<f4")
            tensors[name] = found.reshape(entry["shape"])
    return tensors


def float8_of(bits):
    """Numbers of a sign, 4 bits of exponent (of bias 7) and 3 of mantissa; no infinity."""
    bits = bits.astype(int)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -size, size)


def unpack(words, count, axis=1):
    """`count` signed numbers of 4 bits along an axis: eight to an int32, lowest bits first."""
    words = words if axis == 1 else words.T
    numbers = np.stack([(words.view("<u4") >> (4 * i)) & 15 for i in range(8)], axis=-1)
    numbers = numbers.reshape(len(words), -1)[:, :count].astype(int) - 8
    return numbers if axis == 1 else numbers.T


def read_independently(directory):
    """Every weight of a directory in float64, dequantized as `config.json` says."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = read_raw(directory / "model.safetensors")
    modules = {name.rsplit(".", 1)[0] for name in tensors}
    weights = {}
    for module in sorted(modules):
        mine = {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        scheme = find_scheme(config, module)
        if scheme is None:
            weights |= {f"{module}.{end}": tensor for end, tensor in mine.items()}
            continue
        arguments = scheme["weights"]
        scale = mine["weight_scale"].astype(np.float64)
        zero = np.zeros(scale.shape)
        if scheme["format"] == "pack-quantized":
            assert arguments["num_bits"] == 4
            out, width = mine["weight_shape"]
            q = unpack(mine["weight_packed"], width)
            if not arguments["symmetric"]:
                zero = unpack(mine["weight_zero_point"], out, axis=0)
        elif arguments["type"] == "float":
            assert (scheme["format"], arguments["num_bits"]) == ("float-quantized", 8)
            assert arguments["symmetric"]
            assert (arguments["strategy"], mine["weight"].dtype) == ("channel", np.float64)
            q = mine["weight"]
        else:
            assert (scheme["format"], arguments["type"]) == ("int-quantized", "int")
            assert arguments["num_bits"] == 8
            q = mine["weight"].astype(int)
            if not arguments["symmetric"]:
                zero = mine["weight_zero_point"]
        groups = scale.shape[1]
        if arguments["strategy"] == "channel":
            assert groups == 1
        else:
            assert groups * arguments["group_size"] == q.shape[1]
        share = q.shape[1] // groups
        weights[f"{module}.weight"] = (q - zero.repeat(share, axis=1)) * scale.repeat(share, axis=1)
    return weights


def find_scheme(config, module):
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    if module in config["ignore"] or "norm" in module:
        return None
    groups = config["config_groups"].values()
    by_name = [group for group in groups if module in group["targets"]]
    by_class = [group for group in groups if kind in group["targets"]]
    return (by_name + by_class + [None])[0]
