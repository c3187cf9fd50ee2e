#!/usr/bin/env python3
"""Seeds of fuzz_tokenizer and fuzz_template: one for each class of defect that peers had (sizes, signs, recursion, endless work, code in data).

usage: make_text_seeds.py CORPUS_DIR
"""
import os
import sys

LLAMA, BYTES, SPECIAL, NO_SPACE, NO_KINDS, BOS = 1, 2, 4, 8, 16, 32


def vocab(flags, pre, tokens, merges, text):
    out = bytes([flags, pre, len(tokens)])
    for kind, score, token in tokens:
        out += bytes([kind, score, len(token)]) + token
    out += bytes([len(merges)]) + b"".join(bytes([len(m)]) + m for m in merges)
    return out + text


SPM = [(2, 0, b"<unk>"), (3, 0, b"<s>"), (1, 5, "\u2581".encode()), (1, 4, b"a"), (1, 3, b"aa"), (1, 2, "\u2581a".encode()), (5, 1, b"aaa"), (4, 0, b"<sep>"), (6, 0, b"<0x41>")]
BPE = [(1, 0, b"aa"), (1, 0, b"ab"), (1, 0, "\u0120a".encode()), (3, 0, b"<|im_end|>"), (3, 0, b"<|im"), (4, 0, b"<sep>")]
MERGES = [b"a a", b"a b", "\u0120 a".encode()]
TEXT = "a aab <|im_end|> x<sep>\u4f60 e\u0301 \U0001f600 12345 don't\r\n\n  ".encode() + b"\xff\xc3(\xed\xa0\x80"
TOKENIZER = {
    **{f"bpe-{i}": vocab(BYTES | SPECIAL, i, BPE, MERGES, TEXT) for i in range(8)},
    "bpe-plain": vocab(BYTES, 0, BPE, MERGES, TEXT),
    "bpe-few-bytes": vocab(0, 0, [(1, 0, b"a"), (1, 0, b"b")] + BPE, MERGES, TEXT),
    "bpe-marks": vocab(BYTES, 3, [], [], "a\u0301\u0316\u0345".encode() * 40),
    "bpe-merge-missing": vocab(BYTES, 0, BPE, [b"a zz"], b"a"),
    "bpe-merge-no-space": vocab(BYTES, 0, BPE, [b"aa"], b"a"),
    "bpe-empty-special": vocab(BYTES | SPECIAL, 0, [(3, 0, b""), (4, 0, b"")], [], b"abc"),
    "bpe-bos-outside": vocab(BYTES | BOS, 255, BPE, MERGES, b"a"),
    "bpe-kind-outside": vocab(BYTES, 0, [(200, 0, b"x")], [], b"x"),
    "bpe-long-word": vocab(BYTES, 2, BPE, MERGES, b"a" * 2000),
    "bpe-duplicates": vocab(BYTES, 0, [(1, 0, b"aa"), (1, 0, b"aa")], [b"a a", b"a a"], b"aaaa"),
    "spm": vocab(LLAMA | BYTES, 0, SPM, [], TEXT),
    "spm-special": vocab(LLAMA | SPECIAL, 0, SPM, [], b"<s>a<sep>a" + TEXT),
    "spm-no-space": vocab(LLAMA | NO_SPACE, 0, SPM, [], TEXT),
    "spm-no-kinds": vocab(LLAMA | NO_KINDS, 0, SPM, [], TEXT),
    "spm-byte-negative": vocab(LLAMA, 0, SPM + [(6, 0, b"<0x-1>")], [], b"a"),
    "spm-byte-long": vocab(LLAMA, 0, SPM + [(6, 0, b"<0x1000000000>")], [], b"a"),
    "spm-byte-empty": vocab(LLAMA, 0, SPM + [(6, 0, b"")], [], b"a"),
    "spm-long": vocab(LLAMA, 0, SPM, [], b"a" * 2000),
    "truncated": vocab(BYTES, 0, BPE, MERGES, b"")[:9],
    "empty": b"",
}
TEMPLATE = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "namespace": "{%- set ns = namespace(a=true, i=messages|length - 1) %}{%- for m in messages[::-1] %}{%- if ns.a and m.content is string and not(m.content.startswith('<t>')) %}{%- set ns.a = false %}{%- endif %}{%- endfor %}{{ ns.i }}",
    "macro": "{% macro turn(role, text='', end=true) %}<{{ role | upper }}>{{ text | trim }}{% if end %}</>{% endif %}{% endmacro %}{% for m in messages -%}{{ turn(m.role, text=m.content) }}{%- endfor %}",
    "filters": "{{ messages|map(attribute='role')|unique|sort(reverse=true)|join(',') }}{{ messages|selectattr('role','equalto','user')|list|tojson(indent=2) }}{{ 'a,b'.split(',')[-1]|title|indent(2, true) }}",
    "split": "{{ messages[1].content.split('<think>')[-1].lstrip('\\n').replace('l', 'L', 1)[1:-1] }}{{ messages[-1]['content'] or none is none }}",
    "loops": "{% for k, v in {'a': 1, 2: [3, (4,)]}.items() if k %}{{ loop.index ~ loop.last }}{% if v == 1 %}{% continue %}{% endif %}{% break %}{% else %}x{% endfor %}",
    "whitespace": "  {%- if true -%}  a  {#- c -#}\n  {%+ set x %} b {% endset %}\n{% raw %}{{ x }}{% endraw %}{% filter upper %}q{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}",
    "numbers": "{{ 1 + 2.5 * 3 // 2 % 7 ** 2 - -1 }}{{ 9223372036854775807 }}{{ 1e308 * 10 }}{{ 7 / 2 }}{{ '12'|int + '1.5'|float|round(1)|int }}{{ -5|abs }}",
    "tests": "{{ 1 is odd and 2 is divisibleby 2 or x is not defined and [] is iterable and {} is mapping and 'a' in 'abc' }}",
    "strings": "{{ 'a\\n\\x41\\u00e9\\'q' \"w\" ~ 1 ~ none }}{{ '\u00e9\u0130\u03a3'|lower|upper|capitalize }}{{ 'ab' * 3 }}{{ 'x'.center }}",
    "raise": "{{ raise_exception('no ' ~ messages[0].role) }}",
    "time": "{{ strftime_now('%d %b %Y') }}",
    "recursion": "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set ns = namespace(x='abc') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "itself": "{% set ns = namespace() %}{% set ns.n = [ns] %}{{ ns.n == ns.n }}{{ ns.n|tojson }}{{ ns.n }}",
    "host-objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__init__.__globals__ }}{{ self }}{{ cycler.__init__ }}",
    "include": "{% include '/etc/passwd' %}{% import 'os' as os %}",
    "nested": "{{ " + "[" * 120 + "1" + "]" * 120 + " }}",
    "nested-blocks": "{% if 1 %}" * 120,
    "slices": "{{ 'abc'[5:-9:-1] }}{{ [1,2,3][::9223372036854775807] }}{{ (1,2)[-9223372036854775807:] }}{{ 'abc'[:] }}",
    "unfinished": "{{ 'abc",
    "unfinished-raw": "{% raw %}{{",
    "unfinished-comment": "{# abc",
}


def main():
    for folder, seeds in (("tokenizer", TOKENIZER), ("template", TEMPLATE)):
        path = os.path.join(sys.argv[1], folder)
        os.makedirs(path, exist_ok=True)
        for name, data in seeds.items():
            with open(os.path.join(path, name), "wb") as file:
                file.write(data if isinstance(data, bytes) else data.encode())


main()
