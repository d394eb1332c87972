# ruff: noqa: E501, W291 (white space and long lines are what is tested)
"""Chat templates of the kinds that checkpoints come with, written for the tests.

Each is `(special tokens that it writes, source)`; the tokens of a tokenizer for all of them are in
`SPECIAL`. None is a publisher's text; each has the turns that its family is known for.
"""

from __future__ import annotations

CHATML = """\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set loop_messages = messages[1:] -%}
    {%- set system_message = messages[0]['content'] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
    {%- set system_message = false -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if loop.index0 == 0 and system_message != false -%}
        {%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] -%}
    {%- else -%}
        {%- set content = message['content'] -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

LLAMA3_TOOLS = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message is taken out, so that it can be put where it belongs. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You may call these functions. Answer with JSON for a call.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("There is no first user message to put the tools in!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given these functions, answer with JSON for a call " }}
    {{- 'in the format {"name": function name, "parameters": dictionary of arguments}.\n\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
            {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='', index=0, last_user=-1) %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == ns.last_user %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != 'return' %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' if loop.last else '}}, ' }}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and ns.system %}
            {{- '[INST] ' + ns.system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}{{ ', ' if not loop.last else '' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content|trim + eos_token }}
    {%- elif message.role in ['tool', 'tool_results'] %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, got ' ~ message.role ~ '!') }}
    {%- endif %}
{%- endfor %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ALPACA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}

{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message['role'] == 'user' %}
### Instruction:
{{ message['content'] | trim }}
{%- if not loop.last %}


{% endif %}
{%- elif message['role'] == 'assistant' %}


### Response:
{{ message['content'] | trim }}{{ eos_token }}
{%- if not loop.last %}


{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}


### Response:
{% endif %}"""

VICUNA = """\
{%- set system = 'A chat between a curious user and an assistant.' -%}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif -%}
{{ system }}{% for message in messages %}
{%- if message.role == 'user' %} USER: {{ message.content.strip() }}
{%- elif message.role == 'assistant' %} ASSISTANT: {{ message.content.strip() }}</s>
{%- endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"""

MACROS = """\
{%- macro header(role, end='<|end_header_id|>\n\n') -%}
<|start_header_id|>{{ role }}{{ end }}
{%- endmacro -%}
{%- macro type_of(schema) -%}
    {%- if schema.type is string -%}{{ schema.type }}
    {%- elif schema.type is sequence -%}{{ schema.type | join(' or ') }}
    {%- else -%}any{%- endif -%}
    {%- if schema.enum %} in {{ schema.enum | tojson }}{% endif -%}
{%- endmacro -%}
{%- macro turn(role) -%}
    {{ header(role) }}{{ caller() }}<|eot_id|>
{%- endmacro -%}
{{ bos_token }}
{%- if tools -%}
    {%- call turn('system') -%}
    {%- for tool in tools -%}
        {{ tool.function.name }}({%- for name, schema in tool.function.parameters.properties | dictsort -%}
        {{ name }}: {{ type_of(schema) }}{{ ', ' if not loop.last }}
        {%- endfor -%}) # {{ tool.function.description | default('no description', true) }}
{% endfor -%}
    {%- endcall -%}
{%- endif -%}
{%- for message in messages -%}
    {%- call turn(message.role) %}{{ (message.content or message.tool_calls | tojson) | trim }}{% endcall -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif -%}"""

LOOP_CONTROLS = """\
{%- set ns = namespace(seen=0, roles=[]) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {%- set ns.roles = ns.roles + [message.role] -%}
    {%- if ns.seen > 3 -%}... {{ ns.roles | length }} of {{ messages | length }}{% break %}{%- endif -%}
    {{ loop.cycle('<|user|>', '<|assistant|>') }}{{ message.content if message.content is string else '' }}
    {%- if loop.previtem is defined and loop.previtem.role == message.role %} (again){% endif -%}
    {{ '\n' if not loop.last }}
{%- else -%}
nothing
{%- endfor -%}
{{ ns.roles | unique | join('/') }}"""

GENERATION = """\
{% set note = 'outer' %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{% set note = 'inner' %}{{ (message.content or '') | trim }}{{ note }}<|im_end|>{% endgeneration %}

{%- generation -%}
  and {{ loop.index }}
{%- endgeneration %}
{%- else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{%- endif %}
[{{ note }}]
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

JSON = """\
{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ (tools or []) | tojson(indent=4, sort_keys=True) }}
{{ messages[-1] | tojson(ensure_ascii=True) }}
{{ messages[0] | tojson(separators=(',', ':')) }}
{{ {'é<&>': [1, 2.5, none, true, "it's"]} | tojson }}"""

RAG = """\
{{ bos_token }}{% if documents %}<results>
{% for document in documents %}
Document: {{ loop.index0 }}
{% for key, value in document.items() %}
{{ key }}: {{ value }}
{% endfor %}
{% if not loop.last %}

{% endif %}
{% endfor %}
</results>{% endif %}
{% for message in messages %}
<|start_header_id|>{{ message.role | upper }}<|end_header_id|>{{ message.content | default('', true) | replace('\n', ' ') }}<|eot_id|>
{% endfor %}"""

STRIPS = """
   {% if true %}
      {{ bos_token }}
   {% endif %}
{# a comment of
   two lines #}
{%+ if true %}  kept before{% endif %}
    {%- for message in messages +%}
  {{- message.role | capitalize | center(12) -}} : {{ message.content | string | trim | wordwrap(20) | indent(4) }}
	{{ message.content | string | lstrip if false else message.content | string | length }}   
{% raw %}{{ raw }} {% x %}{% endraw %}

    {% endfor -%}
  {% set text %}
  block {{ messages | length }}
  {% endset %}
  {{ text | trim }}{% filter trim %}  <|eot_id|> {% endfilter %}{% filter upper %} shout{% endfilter %}
{%- if add_generation_prompt -%}   
   <|start_header_id|>assistant  {% endif +%}

"""

MULTI_PART = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- elif message['content'] is none or message['content'] is undefined %}{{ '(nothing)' }}
{%- else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' or 'image_url' in part %}<|image|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HERMES = """\
{{ bos_token }}{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
# Tools
<tools>{% for tool in tools %}

{{ tool | tojson }}{% endfor %}

</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role in ('tool', 'ipython') %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != message.role %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content | string + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != message.role %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

REASONING = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{%- if message.reasoning_content is defined and message.reasoning_content %}
<think>
{{ message.reasoning_content.strip('\n') }}
</think>
{% endif %}
{% if message.role == 'assistant' and message.content is string and '</think>' in message.content -%}
{{ message.content.split('</think>')[-1].lstrip('\n') }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

FROM_PARTS = """\
{% for message in messages %}{{ '<|' + message['role'] + '_turn|>' + '\n' + message['content'] | string + '<|end_turn|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant_turn|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

DATES = """\
{{ bos_token }}{{ strftime_now('%Y-%m') }} {{ strftime_now("%B %d, %Y") if strftime_now is defined }}
{{ date_string | default('no date') }}{{ dict(a=1, b=messages | length) | tojson }}
{% for name, value in {'x': 1, 'y': [2, 3]} | items %}{{ name }}={{ value }};{% endfor %}
{{ range(3) | list }} {{ messages | map(attribute='role') | join(',') }} \
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages[::-1][0].role }} \
{{ messages | groupby('role') | map('first') | join('+') }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 1.0 }} {{ none }} \
{{ 'é' ~ 1 ~ true }} {{ "%s|%05.1f" | format('a', 2) }} {{ undefined_thing }}|{{ undefined_thing is defined }}"""

# The families, by name. "named" is of several templates.
TEMPLATES: dict[str, str | dict[str, str]] = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3-tools": LLAMA3_TOOLS,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "macros": MACROS,
    "loop-controls": LOOP_CONTROLS,
    "generation": GENERATION,
    "json": JSON,
    "rag": RAG,
    "strips": STRIPS,
    "multi-part": MULTI_PART,
    "hermes": HERMES,
    "reasoning": REASONING,
    "from-parts": FROM_PARTS,
    "dates": DATES,
    "named": {"default": CHATML, "tool_use": HERMES, "rag": RAG},
    "nothing": "{% for m in messages %}{{ m.content }}{% endfor %}",
}

# The special tokens that some of them write.
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|image|>",
    "<|end_turn|>",
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather \"now\" in a city: 'sun' & <rain>.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Such as Punö"},
                "unit": {"type": ["string", "null"], "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}

SYSTEM = {"role": "system", "content": " Be kind.\n\nAnd short. "}
USER = {"role": "user", "content": "  Hello é 你好 👋, 12345!\n\n- a\n- b\t"}
MODEL = {"role": "assistant", "content": '\n\nYes: "quoted" & <b>it\'s</b>.\n'}
AGAIN = {"role": "user", "content": "And? {{ 7 * 7 }} {% raw %}"}


def call(name: str, **arguments: object) -> dict:
    """A turn in which the model calls one function."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


CONVERSATIONS: dict[str, list[dict]] = {
    "single": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, MODEL, AGAIN],
    "system-turns": [SYSTEM, USER, MODEL, AGAIN, {"role": "assistant", "content": "49"}],
    "empty": [{"role": "user", "content": ""}],
    "none-valued": [{**USER, "name": None, "tool_calls": None}],
    "odd-roles": [USER, AGAIN, {"role": "critic", "content": "No."}],
    "tool-call": [SYSTEM, USER, call("get_weather", city="Punö", unit="C")],
    "tool-result": [
        USER,
        call("get_weather", city="Punö"),
        {"role": "tool", "name": "get_weather", "content": '{"sky": "clear", "t": 12.5}'},
    ],
    "built-in-call": [
        USER,
        call("brave_search", query="Puno"),
        {"role": "ipython", "content": {"hits": [1, 2]}},
        MODEL,
    ],
    "parts": [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What is "},
                {"type": "text", "text": "this?"},
            ],
        }
    ],
    "thoughts": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes", "reasoning_content": "hm"},
        AGAIN,
    ],
    "old-thoughts": [USER, {"role": "assistant", "content": "Yes", "reasoning": "\nso\n"}, AGAIN],
}

# What else is passed, by name.
OPTIONS: dict[str, dict] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [WEATHER, CLOCK], "add_generation_prompt": True},
    "tools-in-system": {
        "tools": [WEATHER],
        "tools_in_user_message": False,
        "date_string": "1 May 2024",
    },
    "built-in": {
        "builtin_tools": ["brave_search", "code_interpreter"],
        "date_string": "1 May 2024",
        "enable_thinking": False,
        "add_generation_prompt": True,
    },
    "documents": {"documents": [{"title": "A", "text": "a\nb"}, {"title": "é", "text": ""}]},
    "no-tools": {"tools": [], "documents": []},
}
