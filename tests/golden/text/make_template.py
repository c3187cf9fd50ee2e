#!/usr/bin/env python3
"""Golden renderings of chat templates by Jinja2, set up as model makers' own code does it (sandbox, trim_blocks, lstrip_blocks, loop controls).

usage: make_template.py OUT.json      needs: jinja2

Each case: source (or the name of one of the templates), chat, add_generation_prompt and either output or error (the message of raise_exception(), else "").
"""
import datetime
import json
import sys

import jinja2
import jinja2.ext
import random_templates
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW_S = 1753014896  # 2025-07-20 12:34:56 UTC


class Raised(Exception):
    pass


def environment():
    def raise_exception(message):
        raise Raised(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(NOW_S, datetime.timezone.utc).strftime(f)
    return env


def render(source, messages, prompt, bos, eos):
    variables = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None, "bos_token": bos, "eos_token": eos}
    try:
        return {"output": environment().from_string(source).render(**variables)}
    except Raised as error:
        return {"error": str(error)}
    except Exception as error:  # every other failure: that it fails is what counts
        if len(source) < 120:
            print(f"note: {source!r}: {type(error).__name__}: {error}", file=sys.stderr)
        return {"error": ""}


CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SMOLLM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
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
{% endfor %}
"""
LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if loop.index0 == 0 -%}{% set content = system_message + message['content'] %}{%- else -%}{% set content = message['content'] %}{%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ ' ' ~ content.strip() ~ ' ' ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
LLAMA3 = """{{- bos_token }}
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

{#- The system message, if there is one. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- Header #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls[0].function.name }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are Qwen.' }}{%- endif %}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}{%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- endif -%}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|>'}}{% endif %}"""
COMMAND = """{{ bos_token }}{% macro turn(role, text='', end=true) %}<|START|>{{ role | upper }}|{{ text | trim }}{% if end %}<|END|>{% endif %}{% endmacro %}{% for m in messages -%}
  {{ turn(m.role, text=m.content) }}
{%- endfor %}{% if add_generation_prompt %}{{ turn('chatbot', end=false) }}{% endif %}"""
CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "  What is 2+2?\n")],
    [("user", "a"), ("assistant", "b <think>\nhm\n</think>\n\nfour"), ("user", "c")],
    [("system", "S"), ("user", "a"), ("assistant", " b "), ("user", "\u4f60\u597d \U0001f600 <|im_end|> {{ 7*7 }}"), ("assistant", "d")],
    [("user", "a"), ("user", "b")],
    [("assistant", "x")],
    [("system", "only")],
    [("user", "")],
    [("critic", "odd role")],
]
CASES = r"""
{{ 1 }}{{ 1.0 }}{{ 1e16 }} {{ 1e15 }} {{ 0.0001 }} {{ 0.00001 }} {{ 1.5e300 }} {{ 0.1 + 0.2 }} {{ 100.0 / 3 }} {{ -0.0 }} {{ 1_000 }}
{{ true }} {{ False }} {{ none }} {{ None }} [{{ undefined_name }}]
{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 ** 3 ** 2 }} {{ 6 / 4 }} {{ 6 / 3 }}
{{ 1 + 2 * 3 - 4 }} {{ (1 + 2) * 3 }} {{ -2 ** 2 }} {{ - 3 + 5 }} {{ +4 }} {{ 2 * 3 ~ 4 }}
{{ 1 ~ 2 + 3 }}
{{ 1 ~ 2 }} {{ 'a' ~ 1 ~ none ~ true }} {{ 'a' 'b' "c" }} {{ 'x' * 3 }} {{ 3 * 'y' }} {{ [1, 2] * 2 }} {{ [1] + [2, 'x'] }} {{ (1,) + (2,) }}
{{ 1 / 0 }}
{{ 1 // 0 }}
{{ 'a' + 1 }}
{{ 1 + none }}
{{ missing + 'x' }}
{{ missing.attribute }}
{{ missing['x'] }}
{{ missing() }}
{{ none.x }}|{{ none['x'] }}|{{ (1).real_nothing }}
{{ messages.nothing }}|{{ messages[99] }}|{{ messages[0].nothing }}|{{ messages[0]['nothing'] }}
{{ messages[0].nothing.deeper }}
{{ 1 < 2 }} {{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 'a' < 'b' }} {{ 1 == 1.0 }} {{ 1 == true }} {{ 'a' == "a" }} {{ [1, 2] == [1, 2] }} {{ (1, 2) == [1, 2] }} {{ {'a': 1} == {'a': 1.0} }} {{ none == none }} {{ x == y }} {{ x == none }} {{ 1 != 2 }} {{ [1, 2] < [1, 3] }}
{{ 1 < 'a' }}
{{ none < 1 }}
{{ 'b' in 'abc' }} {{ 'z' not in 'abc' }} {{ 1 in [1, 2] }} {{ 3 in (1, 2) }} {{ 'a' in {'a': 1} }} {{ 1 in {'a': 1} }} {{ 'x' in missing }} {{ not 1 in [1] }}
{{ 1 in 'abc' }}
{{ 1 in 5 }}
{{ 1 and 2 }} {{ 0 and 2 }} {{ 0 or 'x' }} {{ '' or none }} {{ not '' }} {{ not 'a' and true }} {{ true or missing.x }} {{ 1 if true else 2 }} [{{ 1 if false }}] {{ 'a' if 0 else 'b' if 0 else 'c' }}
{{ [] or 'empty' }} {{ {} or 'empty' }} {{ 0.0 or 'zero' }} {{ [0] and 'full' }}
{{ [1, 'two', 3.0, none, true, [4], {'k': 'v'}] }} {{ (1, 2) }} {{ (1,) }} {{ () }} {{ {'a': 1, 'b': [2]} }} {{ {1: 2, none: 3} }}
{{ ["it's", 'say "x"', 'both \' and "', 'tab\t', 'nl\n', 'back\\slash', '\x00\x7f\u00e9\u200b\u4f60\U0001f600'] }}
{{ 'a\nb\t\'q\' \"d\" \\ \x41 \u00e9 \101 \q' }}
{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abc'[9] }}|{{ 'h\u00e9llo\U0001f600'[1] }}{{ 'h\u00e9llo\U0001f600'[-1] }}|{{ 'abcdef'[1:3] }} {{ 'abcdef'[::-1] }} {{ 'abcdef'[::2] }} {{ 'abcdef'[-3:] }} {{ 'abcdef'[:-2] }} {{ 'abcdef'[5:1:-2] }} {{ 'abc'[7:] }} {{ 'abc'[-9:2] }}
{{ [1,2,3,4][1:] }} {{ [1,2,3,4][::-1] }} {{ [1,2,3,4][-2:] }} {{ (1,2,3)[1:] }} {{ [1,2,3][10:] }} {{ [1,2,3][none:2] }} {{ [1,2,3].1 }} {{ [[1,2],[3]][0][1] }}
{{ 'abc'[::0] }}
{{ 5[0] }}|{{ {'a': {'b': 'c'}}.a.b }} {{ {'a': 1}['a'] }} {{ {'items': 5}['items'] }} {{ {'get': 1}.get('get') }}
{% set x = 1 %}{{ x }}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% for i in [1, 2] %}{{ x }}{% set x = i + 10 %}{{ x }}{% endfor %}{{ x }}
{% for i in [1,2,3] %}{% if loop.first %}{% set y = 'first' %}{% endif %}{{ y }},{% endfor %}[{{ y }}]
{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }} {{ ns.missing }}|{{ ns['n'] }}
{% set d = {} %}{% set d.x = 1 %}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = [3, 4] %}{{ c }}{{ d }}{% set t = 1, 2 %}{{ t }}
{% set a, b = [1] %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for k in {'a': 1, 'b': 2} %}{{ k }}{% endfor %}{% for k, v in {'q': 1}|items %}{{ k }}{{ v }}{% endfor %}
{% for x in [] %}a{% else %}empty{% endfor %}{% for x in missing %}a{% else %}none{% endfor %}{% for x in [1] %}a{% else %}b{% endfor %}
{% for x in 5 %}{% endfor %}
{% for x in none %}{% endfor %}
{% for c in 'h\u00e9y' %}{{ c }}.{% endfor %}
{% for x in ['a','b','c'] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{{ loop.depth }};{% endfor %}
{% for x in [1,1,2] %}{{ loop.changed(x) }}{% endfor %}{% for a in [1,2] %}{% for b in [1] %}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}{% endfor %}
{% for x in range(10) if x % 3 == 0 %}{{ x }}/{{ loop.length }} {% endfor %}{% for x in [1,2] if x > 5 %}{% else %}none{% endfor %}
{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}
{{ range(3)|list }} {{ range(1, 4)|list }} {{ range(5, 0, -2)|list }} {{ range(0)|list }} {{ range(3)|length }}
{% macro m(a, b=2, c=a) %}[{{ a }},{{ b }},{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(1, c=5) }}{{ m() }}{{ m(b=1, a=0) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(z=2) }}
{% set g = 'late' %}{% macro m() %}{{ g }}{{ h }}{% endmacro %}{% set h = 'later' %}{{ m() }}{% set g = 'changed' %}{{ m() }}
{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}
{% macro m() %} text {% endmacro %}{{ m() | trim | upper }}{{ m()|length }}{% set s = m() %}[{{ s }}]{{ 'te' in m() }}
{% set x %}a{{ 1 + 1 }}b{% endset %}{{ x }}{% set y | upper | trim %}  q {% endset %}[{{ y }}]{% filter upper %}abc {{ 'd' }}{% endfilter %}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}[{{ a }}]{% with %}{% set q = 1 %}{% endwith %}[{{ q }}]
{% raw %}{{ not evaluated }} {% if %}{% endraw %}{# comment {{ x }} #}done
{{ '  x '|trim }}|{{ 'xxaxx'|trim('x') }}|{{ missing|trim }}|{{ 5|trim }}
{{ 'abc'|length }}{{ [1,2]|count }}{{ {'a':1}|length }}{{ 'h\u00e9\U0001f600'|length }}{{ missing|length }}
{{ 5|length }}
{{ none|length }}
{{ 'Hello w\u00f6rld \u00df \u0130'|upper }} {{ 'HELLO W\u00d6RLD \u03a3\u03a3 X'|lower }} {{ "hello world-foo (bar) it's"|title }} {{ 'hELLO wORLD'|capitalize }} {{ 1|upper }} {{ "it's a dog's 2nd".title() }} {{ 'aB'.capitalize() }}
{{ [1,2,3]|join }} {{ [1,2,3]|join(', ') }} {{ ['a', none, 1.5]|join('-') }} {{ messages|join(',', attribute='role') }} {{ 'abc'|join('.') }} {{ missing|join }} {{ {'a': 1, 'b': 2}|join('+') }}
{{ missing|default('d') }} {{ none|default('d') }} {{ none|default('d', true) }} {{ ''|d('e', boolean=true) }} [{{ missing|default }}] {{ 0|default(5, true) }} {{ messages[0].zzz|default('no') }}
{{ {'b': [1, 2.5, none, true, 'x"y\n\u00e9<>&\''], 'a': {}}|tojson }} {{ []|tojson }} {{ 'a'|tojson }} {{ 1e20|tojson }} {{ {1: 2, true: 3}|tojson }}
{{ {'b': [1, {'c': []}], 'a': {}}|tojson(indent=2) }}
{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }} {{ '\u00e9\U0001f600\x7f'|tojson(ensure_ascii=true) }} {{ messages|tojson }}
{{ missing|tojson }}
{{ [3,1,2]|first }}{{ [3,1,2]|last }}{{ 'abc'|first }}{{ 'abc'|last }}[{{ []|first }}][{{ []|last }}]{{ {'k': 1}|first }}
{{ 'abc'|list }} {{ {'a': 1}|list }} {{ (1, 2)|list }} {{ missing|list }}
{{ messages|map(attribute='role')|list }} {{ ['a','b']|map('upper')|list }} {{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }} {{ [{}]|map(attribute='z', default='dd')|list }} {{ [[1,2],[3,4]]|map(attribute=1)|list }} {{ [' a ']|map('trim')|join }} {{ ['a-b']|map('replace', '-', '+')|list }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('role', '==', 'user')|map(attribute='content')|list }} {{ [{'a': 1}, {'a': 0}, {}]|selectattr('a')|list }} {{ [{'a': 1}, {}]|selectattr('a', 'defined')|list }} {{ [1,2,3,4]|select('odd')|list }} {{ [1,2,3,4]|reject('odd')|list }} {{ [0, 1, '', 'x']|select|list }} {{ [1,2]|select('in', [2,3])|list }}
{{ 'aXbXc'|replace('X', '-') }} {{ 'aXbXc'|replace('X', '-', 1) }} {{ 'abc'|replace('', '.') }} {{ 5|replace(5, 6) }}
{{ '42'|int }} {{ ' 42 '|int }} {{ '4_2'|int }} {{ 'x'|int }} {{ 'x'|int(7) }} {{ '3.9'|int }} {{ 3.9|int }} {{ -3.9|int }} {{ true|int }} {{ none|int(3) }} {{ 'ff'|int(base=16) }} {{ '0x1f'|int(base=16) }} {{ '1e2'|int }} {{ '-7'|int }} {{ '2.5'|float }} {{ 'y'|float }} {{ 1|float }} {{ 'nan'|float }} {{ 'inf'|float }}
{{ 1|string + 'x' }} {{ [1]|string|length }} {{ none|string }} {{ '<b>'|safe }}
{{ 'a\nb\n\nc'|indent }}|{{ 'a\nb\n\nc'|indent(2, true) }}|{{ 'a\n\nb'|indent(2, blank=true) }}|{{ 'a\nb'|indent('> ') }}|{{ ''|indent }}|{{ 'a\n'|indent }}|
{{ [1, 2, 1, 'a', 'A']|unique|list }} {{ ['a', 'A']|unique(case_sensitive=true)|list }} {{ [3,1,2]|reverse|list }} {{ 'abc'|reverse }} {{ [3,1,2]|sort }} {{ ['b','A','c']|sort }} {{ ['b','A','c']|sort(case_sensitive=true) }} {{ [3,1,2]|sort(reverse=true) }} {{ [{'n': 2}, {'n': 1}]|sort(attribute='n') }}
{{ [1, 'a']|sort }}
{{ 2.5|round }} {{ 3.5|round }} {{ 2.675|round(2) }} {{ 42|round }} {{ 2.1|round(method='ceil') }} {{ 2.9|round(method='floor') }} {{ 2.345|round(1, 'ceil') }} {{ -5|abs }} {{ -2.5|abs }} {{ [1,2,3]|sum }} {{ [{'a':1},{'a':2}]|sum(attribute='a') }} {{ [3,1]|min }} {{ ['b','A']|max }} {{ {'b': 1, 'A': 2}|dictsort }} {{ {'b': 1, 'a': 2}|dictsort(by='value') }}
{{ x is defined }} {{ messages is defined }} {{ x is undefined }} {{ none is none }} {{ 'a' is string }} {{ 1 is string }} {{ {} is mapping }} {{ [] is mapping }} {{ [] is iterable }} {{ 5 is iterable }} {{ 'a' is iterable }} {{ [] is sequence }} {{ {} is sequence }} {{ 'a' is sequence }} {{ x is sequence }} {{ x is iterable }} {{ 1 is number }} {{ 1.5 is number }} {{ true is number }} {{ true is boolean }} {{ 1 is boolean }} {{ true is integer }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is true }} {{ 1 is true }} {{ false is false }} {{ 0 is false }}
{{ 3 is odd }} {{ 4 is even }} {{ -3 is odd }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(2) }} {{ 1 is equalto 1 }} {{ 1 is eq 2 }} {{ 1 is ne 2 }} {{ 1 is in [1] }} {{ 1 is not in [1] }} {{ 'a' is lower }} {{ 'a' is upper }} {{ 5 is gt 3 }} {{ 5 is le 3 }} {{ 1 is sameas 1 }} {{ range is callable }} {{ 5 is callable }} {{ x is not defined and 1 is defined }} {{ 1 is none or 2 is number }}
{{ '  ab '.strip() }}|{{ '  ab '.lstrip() }}|{{ '  ab '.rstrip() }}|{{ 'xxabxx'.strip('x') }}|{{ 'xyabyx'.lstrip('xy') }}|{{ '\u00a0\u3000x\u2003'.strip() }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b c '.split() }} {{ 'a,b,c'.split(',', 1) }} {{ ' a  b c '.split(none, 1) }} {{ ''.split() }} {{ ''.split(',') }} {{ 'a,b,c'.rsplit(',', 1) }} {{ 'a\nb\r\nc'.splitlines() }} {{ 'x'.split('x') }} {{ 'a b '.split(maxsplit=0) }}
{{ 'a'.split('') }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('bc') }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.endswith('') }} {{ 'aXbX'.replace('X', 'y') }} {{ 'aXbX'.replace('X', 'y', 1) }} {{ 'abcb'.find('b') }} {{ 'abcb'.rfind('b') }} {{ 'abc'.find('z') }} {{ '\u00e9x'.find('x') }} {{ 'abab'.count('ab') }} {{ ', '.join(['a', 'b']) }} {{ 'abc'.upper() }} {{ 'ABC'.lower() }} {{ '12'.isdigit() }} {{ ''.isdigit() }} {{ 'ab1'.isalnum() }} {{ 'ab'.isalpha() }} {{ ' '.isspace() }} {{ 'Ab'.isupper() }} {{ 'a1'.islower() }} {{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }}
{{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b') }} {{ {'a': 1}.get('b', 5) }} {{ {'a': 1, 'b': 2}.keys()|list }} {{ {'a': 1, 'b': 2}.values()|list }} {{ {'a': 1}.items()|list }} {{ [1,2,1].count(1) }} {{ [1,2].index(2) }} {{ dict(a=1, b='x') }} {{ dict({'q': 1}, z=2) }}
{{ 'abc'.nosuchmethod() }}
{{ [1].append(2) }}
{{ messages.pop() }}
{{ 'a'.__class__ }}|{{ messages.__class__.__mro__ }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ 'x'|nosuchfilter }}
{{ 'x' is nosuchtest }}
{{ raise_exception('stop: ' ~ (1 + 1)) }}
{{ strftime_now('%Y-%m-%d %H:%M:%S %b %B %a %j') }}
{% if messages|selectattr('role', 'equalto', 'nobody') %}generators are true{% endif %}{{ (messages|selectattr('role', 'equalto', 'nobody')|list)|length }}
{{ messages|selectattr('role')|length }}
{{ (1, 2, 3)|first }}{{ 1, 2 }}{{ 'trailing comma', }}
a  {%- if true -%}   b   {%- endif -%}  c
  {{- 'x' -}}  y {{ 'z' -}}   w
{%+ if true %} kept {% endif %}|  {%+ if true %}plus{%+ endif %}|
{{ "}}" }} {{ '{%' }} {{ {'a': {'b': 1}} }} {{ [[1]] }}
{{ 'a' if messages[0].role == 'user' and messages|length > 0 else 'b' }}{{ messages[-1]['role'] }}{{ messages[0]['content'][:3] }}
{{ 'é' ~ "日本" }} {% set é = 1 %}{{ é }}
{{ 2 > 1 == true }} {{ (2 > 1) == true }} {{ not true == false }} {{ 1 + 1 == 2 and 'y' }}
{{ 'x' is defined and 'y' or 'z' }} {{ ('a', 'b')[1] }} {{ [1, 2, ] }} {{ {'a': 1, } }} {{ -1|abs }} {{ -(1) }} {{ 'a'.upper()|lower ~ 'B' }}
{{ loop }}
{% for m in messages %}{{ loop.nosuch }}{{ loop.index ~ '/' ~ loop.length }} {% endfor %}
{% if missing %}a{% elif 0 %}b{% elif [] %}c{% else %}d{% endif %}{% if not missing %}e{% endif %}
{% generation_unknown %}
{% include 'x' %}
{% if true %}
{% for x in y %}{% endif %}
{{ 1 + }}
{{ (1 }}
{{ 'unterminated }}
{% endif %}
{{ a b }}
{% set = 1 %}
{% break %}
{% for x in [1,2] %}{% break %}{% else %}also after break{% endfor %}{% for x in [1,2] %}{% continue %}{% else %}c{% endfor %}{% for x in [1,2] %}{% if x == 2 %}{% break %}{% endif %}{% else %}not{% endfor %}
{{ [{'n': 1}, {}]|sort(attribute='n') }}
{{ [{}, {'m': 1}]|sort(attribute='n') }}
{{ none|indent }}
{{ 5|indent }}
{{ none|select|list }} {{ 0|map('upper')|list }} {{ ''|selectattr('x')|list }} {{ nothing is callable }}
{{ 5|select|list }}
{{ messages[0] in {'a': 1} }}
{{ {'a': 1}.get([1]) }}
{{ messages[0][1:] }}
{{ missing|dictsort }}
""".strip("\n").split("\n")
MULTILINE = [
    "line1\n  {% if true %}\n    inner\n  {% endif %}\nline2\n",
    "{% for x in [1,2] %}\n  - {{ x }}\n{% endfor %}\nend\n\n",
    "  {# comment #}\nafter\n  {# a #}  {# b #}\nx {# c #}\ny",
    "{% if true %}\r\nwin\r\n{% endif %}\r\nx\r",
    "a\n\n  {%- if true %}\n\n b\n  {%- endif %}\n\n\nc",
    "{% raw %}\n  {{ x }}\n  {% endraw %}\nafter",
    "  {% raw -%}  a  {%- endraw %}  b",
    "  {{ 'x' }}\n  {% set a = 1 %}\n  {{ a }}  \n",
    "\t{% if true %} \t{% endif %}\n \t{%- set b = 2 %}\n{{ b }}",
    "{% set a = [\n  1,\n  2,\n] %}{{ a }}\n{{\n a\n}}\n",
    "x {% if true %} y {% endif %} z\n{% if false %}\n{% endif %}\n{% if true %}\n\n{% endif %}",
    "{%- for m in messages %}\n    {{- m.role }}:\n    {{ m.content -}}\n{%- endfor %}\n",
    "\n{% if true %}\nleading newline\n{% endif %}",
    "{#- strip -#}  \n a {#- b #}\n c",
    "{{ 'no trim' }}\nnewline kept\n",
    "{% macro m(x) %}\n  {{ x }}\n{% endmacro %}\n{{ m(1) }}{{ m(2)|trim }}",
    "   ", "", "\n", "\n\n", "plain", "{", "{}", "{ {", "a {", "}} %}", "{{ '\n' }}|", "a\n{% if 1 %}b{% endif %}\n  {% if 1 %}c\n{% endif %}",
]


def main():
    cases = []
    named = {"chatml": CHATML, "smollm2": SMOLLM, "zephyr": ZEPHYR, "llama2": LLAMA2, "llama3": LLAMA3, "qwen2.5": QWEN, "qwen3": QWEN3, "mistral": MISTRAL,
             "gemma": GEMMA, "phi3": PHI3, "deepseek": DEEPSEEK, "command": COMMAND}
    for name, source in named.items():
        for i, chat in enumerate(CHATS):
            for prompt in (True, False):
                cases.append((name, source, chat, prompt))
    chat = [("user", "Hello there"), ("assistant", "Hi")]
    for i, source in enumerate(CASES):
        cases.append((f"case-{i}", source, chat, True))
    for i, source in enumerate(MULTILINE):
        cases.append((f"multiline-{i}", source, chat, False))
    for i, source in enumerate(random_templates.make(41, 400)):
        cases.append((f"random-{i}", source, chat, True))
    out = []
    for name, source, chat, prompt in cases:
        messages = [{"role": r, "content": c} for r, c in chat]
        result = render(source, messages, prompt, "<s>", "</s>")
        if any(word in result.get("output", "") for word in random_templates.PYTHON_ONLY):
            continue
        out.append({"name": name, **({} if name in named else {"source": source}), "chat": chat, "prompt": prompt, **result})
    with open(sys.argv[1], "w") as file:
        json.dump({"now_s": NOW_S, "bos": "<s>", "eos": "</s>", "templates": named, "cases": out}, file, ensure_ascii=True, separators=(",", ":"))
        file.write("\n")


main()
