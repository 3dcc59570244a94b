"""Chat templates in the manner of well-known model families, for the tiny model's special tokens."""

# Header blocks, a date-free preamble, tools in the first user message, content trimmed.
LLAMA_LIKE = """\
{{- bos_token }}
{%- set chat = messages %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] | trim %}
  {%- set chat = messages[1:] %}
{%- else %}
  {%- set system = '' %}
{%- endif %}
{{- '<|im_start|>system<|im_end|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system + '<|endoftext|>' }}
{%- for message in chat %}
  {%- if message.role == 'tool' or message.role == 'ipython' %}
    {{- '<|im_start|>ipython<|im_end|>\\n\\n' }}
    {%- if message.content is mapping or message.content is iterable and message.content is not string %}
      {{- message.content | tojson }}
    {%- else %}
      {{- message.content }}
    {%- endif %}
    {{- '<|endoftext|>' }}
  {%- elif message.tool_calls is defined %}
    {%- for call in message.tool_calls %}
      {{- '<|im_start|>assistant<|im_end|>\\n\\n{"name": "' + call.function.name + '", "parameters": ' }}
      {{- call.function.arguments | tojson }}
      {{- '}<|endoftext|>' }}
    {%- endfor %}
  {%- else %}
    {{- '<|im_start|>' + message['role'] + '<|im_end|>\\n\\n' }}
    {%- if loop.first and tools is not none %}
      {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
    {%- endif %}
    {{- message['content'] | trim + '<|endoftext|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_end|>\\n\\n' }}{%- endif %}
"""

# Instructions in brackets, strict alternation, a namespace, call ids, content as parts.
MISTRAL_LIKE = """\
{%- set ns = namespace(turns=0) -%}
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = none -%}{%- set rest = messages -%}
{%- endif -%}
{%- if tools -%}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}
{%- for message in rest -%}
  {%- if message.role == 'user' -%}
    {%- if ns.turns % 2 -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
    {%- set ns.turns = ns.turns + 1 -%}
    [INST]{%- if system and loop.last -%}
      {%- for part in system -%}{{- part.text + '\\n\\n' -}}{%- endfor -%}
    {%- endif -%}
    {%- for part in message.content -%}{{- part.text -}}{%- endfor -%}[/INST]
  {%- elif message.role == 'assistant' -%}
    {%- if message.tool_calls -%}
      [TOOL_CALLS][
      {%- for call in message.tool_calls -%}
        {{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson -}}
        {{- ', ' if not loop.last -}}
      {%- endfor -%}]
    {%- endif -%}
    {%- if not message.tool_calls -%}{%- set ns.turns = ns.turns + 1 -%}{%- endif -%}
    {%- for part in message.content -%}{{- ' ' + part['text'] | trim -}}{%- endfor -%}{{- eos_token -}}
  {%- elif message.role == 'tool' -%}
    [TOOL_RESULTS]{"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
  {%- endif -%}
{%- endfor -%}
"""

# ChatML with thinking: reasoning of old turns is dropped, results of tools become user messages.
QWEN_LIKE = """\
{%- macro content_of(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for item in content -%}{{- item.text if 'text' in item else '<|image|>' -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].role == 'system' -%}{{- content_of(messages[0].content) + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + content_of(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(last_query=messages | length - 1) -%}
{%- for message in messages[::-1] -%}
  {%- if message.role == 'user' -%}
    {%- set ns.last_query = messages | length - loop.index -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = content_of(message.content) -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if message.reasoning_content and loop.index0 > ns.last_query -%}
      {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- content.lstrip('\\n') -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {%- if call.function.arguments is string -%}{{- call.function.arguments -}}
      {%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""

FAMILIES = {"own": None, "llama": LLAMA_LIKE, "mistral": MISTRAL_LIKE, "qwen": QWEN_LIKE}
