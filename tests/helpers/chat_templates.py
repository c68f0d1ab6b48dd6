"""Chat templates: such as models have, construct by construct, and evil ones. One a line, however long."""
# ruff: noqa: E501

from __future__ import annotations

from typing import Any

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Wie geht's?\n  <b>ü</b>", "name": None},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc", "n": [1, 2.5, None, True]}}}
        ],
        "reasoning_content": "Hm.",
    },
    {"role": "tool", "content": "noon", "tool_call_id": "1"},
    {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nIt is noon. "},
]
LOOP = "{% for m in messages %}"
WRITTEN = [
    "{{ bos_token }}" + LOOP + "<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}",
    LOOP + "{{ m }}|{{ m | tojson }}|{{ m | tojson(indent=2) }}|{{ m.items() | list | length }}|{{ m.get('name', 'no one') }}\n{% endfor %}",
    LOOP + "{{ loop.index0 }}/{{ loop.length }}{{ loop.last }}{{ loop.first }}{{ loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% set ns = namespace(last=-1, seen=[]) %}" + LOOP + "{% if m.role == 'user' and m.content is string %}{% set ns.last = loop.index0 %}"
    "{% set ns.seen = ns.seen + [m.role ~ loop.index] %}{% endif %}{% endfor %}{{ ns.last }}{{ ns.seen | join(', ') }}",
    "{%- macro show(m, mark='#') -%}{{ mark }}{{ m.content | upper }}{{ caller() if caller else '' }}{%- endmacro -%}"
    + LOOP + "{{ show(m) }}{% call show(m, mark='!') %}x{% endcall %}{% endfor %}",
    LOOP + "{% if m.role == 'tool' %}{% continue %}{% elif loop.index > 4 %}{% break %}{% else %}{{ m.role }}{% endif %}{% endfor %}",
    "{{ messages[1:] | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}{{ messages[::-1][0]['role'] }}",
    "{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | unique | sort | join('-') }}{{ messages | length }}",
    "{{ (messages | last).content.split('</think>')[-1].lstrip('\n') }}|{{ 'a,b'.split(',') }}|{{ 'x'.join(['1', '2']) }}|{{ 'abc'[1] }}",
    "{{ '%s is %5.1f' % ('pi', 3.14159) }}|{{ '%(a)s' | format(a=1) }}|{{ '{0} {b:>4}'.format('x', b=2) }}|{{ 'a' * 3 }}|{{ [1] * 2 }}|{{ 7 % 3 }}",
    "{{ 2 ** 10 }}{{ 7 // 2 }}{{ 1 / 4 }}{{ -3 + 1.5 }}{{ 3 * 4 }}{{ 5 - 7 }}{{ 1 < 2 <= 2 != 3 }}{{ 'a' in 'cat' }}{{ 3 not in [1, 2] }}",
    "{% generation %}{% set inner = 'in' %}{{ messages[0].content }}{{ inner }}{% endgeneration %}",
    "{% set text %}{{ messages[1].content }}|{% endset %}{{ text }}{{ text | e }}{{ text | safe + '<i>' }}{% filter upper %}a{% endfilter %}",
    "{% with a = 1, b = 'x' %}{{ a }}{{ b }}{% endwith %}{{ x is defined }}{{ x | default('d') }}{{ none is none }}{{ x }}",
    "{{ {'b': 1, 'a': [2, {'c': 3}]} | tojson(sort_keys=true) }}{{ {'b': 2, 'a': 1} | dictsort }}{{ dict(a=1) }}{{ {'a': 1}['a'] }}",
    "{{ 'one\ntwo' | indent(3) }}{{ 'a-b' | replace('-', '+') }}{{ '  x ' | trim }}{{ 'abc' | first }}{{ [3, 1] | sort | first }}{{ [1, 2] | sum }}",
    "{{ 'ab' | list }}{{ 'ab' | reverse }}{{ [1, 2, 3] | reverse | list }}{{ '3' | int + 1 }}{{ 2.567 | round(1) }}{{ 'a b' | title }}{{ -1 | abs }}",
    LOOP + "{% if m.reasoning_content %}{{ m.reasoning_content }}{{ m.thinking }}{% endif %}{% if not loop.last %},{% endif %}{% endfor %}",
    LOOP + "{% for t in m.tool_calls or [] if t.type == 'function' %}{{ t.function.name }}{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}",
    "{{ range(3) | list }}{% for i in range(2, 0, -1) %}{{ i }}{% else %}none{% endfor %}{% for i in [] %}{% else %}empty{% endfor %}{# no #}",
    "{% set sep = joiner(', ') %}" + LOOP + "{{ sep() }}{{ m.role }}{% endfor %}{{ tools is none }}{{ documents }}{{ raw if raw else 'r' }}",
    "{% raw %}{{ not read }}{% endraw %}{{ 'x' if add_generation_prompt else 'y' }}{{ messages[0]['content'].startswith(('Be', 'x')) }}",
]  # fmt: skip

DOUBLE = "{% for i in range(60) %}{% set ns.x = "
NAMESPACE = "{% set ns = namespace(x='ab') %}"
EVIL = {
    "product": "{{ 'a' * 10**10 }}",
    "product of a list": "{% set x = [0] * 10**10 %}",
    "power": "{% set x = 9 ** 99999999 %}",
    "product of numbers": "{% set ns = namespace(x=10**500) %}" + DOUBLE + "ns.x * ns.x %}{% endfor %}",
    "sum": NAMESPACE + DOUBLE + "ns.x + ns.x %}{% endfor %}",
    "concatenation": NAMESPACE + DOUBLE + "ns.x ~ ns.x %}{% endfor %}",
    "sum of lists": "{% set ns = namespace(x=[1]) %}" + DOUBLE + "ns.x + ns.x %}{% endfor %}",
    "doubling block": NAMESPACE + "{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}" + "x" * 100 + "{% endif %}{% endmacro %}{{ f(60) }}",
    "literal in a loop": "{% for i in range(99999) %}" + "long " * 2000 + "{% endfor %}",
    "shared lists written": "{% set ns = namespace(x=[1]) %}" + DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared lists as JSON": "{% set ns = namespace(x=[1]) %}" + DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "shared lists compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "shared lists tested": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x is eq ns.y }}",
    "shared views": "{% set ns = namespace(x={'a': 1}) %}" + DOUBLE + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x.values() }}",
    "deep values": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "center": "{{ 'a' | center(10**10) }}",
    "constant center": "{{ 'a' | center(99999999999) }}",
    "center method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "replace method": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "join": "{% set x = ['a' * 100000] * 100000 %}{{ x | join }}",
    "join method": "{{ ('a' * 100000).join('b' * 100000) }}",
    "joined many times": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "indent": "{{ ('\n' * 1000) | indent(10**8, blank=true) }}",
    "JSON indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "percent precision": "{{ '%.9999999999f' % 1 }}",
    "percent with a key": "{{ '%(a)9999999999d' % {'a': 1} }}",
    "percent filter": "{{ '%9999999999d' | format(1) }}",
    "percent many times": "{{ ('%(a)s' * 10000) % {'a': 'x' * 100000} }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10**10) }}",
    "format many times": "{{ ('{0}' * 10000).format('x' * 100000) }}",
    "format map": "{{ ('{a}' * 10000).format_map({'a': 'x' * 100000}) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "batch by name": "{{ [1] | batch(linecount=10**10, fill_with=0) | list }}",
    "slice by name": "{{ [1] | slice(slices=10**10) | list }}",
    "center by name": "{{ 'a' | center(width=10**10) }}",
    "mapped center": "{{ ['a'] | map('center', 10**10) | list }}",
    "center found by attr": "{{ ('a' | attr('center'))(10**10) }}",
    "long paths": "{{ range(99999) | map(attribute='a.' * 99999) | list }}",
    "long paths to sort by": "{{ range(99999) | sort(attribute='a,' * 99999) | list }}",
    "splits kept": "{% set ns = namespace(x=[]) %}{% set t = 'a ' * 100000 %}{% for i in range(99999) %}{% set ns.x = [ns.x, t.split()] %}{% endfor %}",
    "lists kept": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, range(99999) | list] %}{% endfor %}",
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass over all": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "filters in loops": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | select | list %}{% endfor %}",
    "searches in loops": "{% for i in range(99999) %}{% set x = 'a' in range(99999) %}{% endfor %}",
    "tests in loops": "{% for i in range(99999) %}{% set x = 'a' is in range(99999) %}{% endfor %}",
    "slices in loops": "{% set x = [0] * 99999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "arguments in loops": "{% set x = [0] * 99999 %}{% macro f() %}{{ varargs | length }}{% endmacro %}{% for i in range(99999) %}{{ f(*x) }}{% endfor %}",
    "sorts in loops": "{% set x = range(99999) | list %}{% for i in range(99999) %}{% set y = x | sort(reverse=true) %}{% endfor %}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "a long template": "x" * 300_000,
    "a reason of its own": "{{ raise_exception('a' * 3000000) }}",
}  # fmt: skip
