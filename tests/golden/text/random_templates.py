"""Random templates from a grammar. Reproducible."""
import random

LITERALS = ["1", "0", "2", "-3", "7", "2.5", "0.1", "1e3", "'a'", "'abc'", "''", "'a b  c'", "'Hello World'", "'x,y,,z'", "'\u00e9\u65e5\U0001f600'", "\"it's\"", "'12'",
            "' 7.9 '", "'\\n line\\n\\nl2 \\t'", "true", "false", "none", "[]", "[1,2,3]", "['b','a','C']", "(1,2)", "{}", "{'a':1,'b':[2,3]}",
            "{'role':'user','content':none}", "messages", "messages[0]", "messages[-1].content", "undef", "bos_token", "range(4)|list", "[[1,'x'],[0,'y']]", "messages|length",
            "ns.v", "x", "m('q')", "'\u00df'", "'\u0391\u03a3'", "[none,true,1.5,'s']", "[{'n':2,'s':'B'},{'n':1,'s':'a'},{'s':'c'}]"]
FILTERS = ["trim", "length", "upper", "lower", "title", "capitalize", "join", "join(', ')", "default('d')", "default('d',true)", "tojson", "tojson(indent=2)", "first", "last",
           "list", "items|list", "map(attribute='role')|list", "map('upper')|list", "map('length')|list", "selectattr('n')|list", "selectattr('n','gt',1)|list",
           "selectattr('role','equalto','user')|list", "rejectattr('n','defined')|list", "select('string')|list", "reject('none')|list", "select|list", "replace('a','ZZ')",
           "replace('','-',2)", "int", "int(5)", "string", "float", "indent", "indent(2,true)", "unique|list", "reverse|list", "sort", "sort(reverse=true)", "sort(attribute='n')",
           "round", "round(1)", "round(1,'floor')", "abs", "sum", "min", "max", "dictsort", "count", "d", "sum(attribute='n')", "unique(attribute='s')|list",
           "tojson(sort_keys=true)", "map(attribute='s',default='?')|join('|')", "join(attribute='s')", "map('int')|sum"]
METHODS = [".strip()", ".lstrip()", ".rstrip('c')", ".split()", ".split(',')", ".split(',',1)", ".split(none,1)", ".rsplit(',',1)", ".startswith('a')", ".endswith(('c','z'))",
           ".upper()", ".lower()", ".title()", ".capitalize()", ".replace('a','b')", ".replace('','.',1)", ".items()|list", ".keys()|list", ".values()|list", ".get('a')",
           ".get('zz',9)", ".find('b')", ".rfind('b')", ".count('a')", ".splitlines()", ".isdigit()", ".isalpha()", ".isupper()", ".islower()", ".isspace()", ".isalnum()",
           ".removeprefix('a')", ".removesuffix('c')", ".index('b')", ".join(['p','q'])", ".role", ".content", ".a", ".nosuch", ".0", ".1", ".count(1)", ".strip('abc ')"]
TESTS = ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "integer", "float", "true", "false", "odd", "even", "divisibleby 2",
         "equalto 1", "eq('a')", "in [1,2,'a']", "in 'abc'", "lower", "upper", "gt 1", "le(2)", "ne none", "callable", "sameas none"]
SUBSCRIPTS = ["0", "-1", "1", "5", "'a'", "'role'"]
# How Python shows what templates cannot otherwise see.
PYTHON_ONLY = ["generator object", "object at 0x", "bound method", "built-in", "dict_", "Macro", "Namespace"]


class Grammar:
    def __init__(self, seed):
        self.rng = random.Random(seed)

    def pick(self, *choices):
        return self.rng.choice(choices)

    def expression(self, depth):
        if depth <= 0 or self.rng.random() < 0.15:
            return self.rng.choice(LITERALS)
        e = lambda: self.expression(depth - 1)
        kind = self.rng.randrange(13)
        if kind == 0:
            return f"({e()} {self.pick('+', '-', '*', '/', '//', '~', '~', '+')} {e()})"
        if kind == 1:
            return f"({e()} {self.pick('==', '!=', '<', '>', '<=', '>=', 'in', 'not in')} {e()})"
        if kind == 2:
            return f"({e()} {self.pick('and', 'or')} {e()})"
        if kind == 3:
            return f"(not {e()})"
        if kind <= 6:
            return f"{e()}|{self.rng.choice(FILTERS)}"
        if kind <= 8:
            return f"({e()}){self.rng.choice(METHODS)}"
        if kind == 9:
            return f"({e()} is {self.pick('', 'not ')}{self.rng.choice(TESTS)})"
        if kind == 10:
            return f"({e()})[{self.rng.choice(SUBSCRIPTS)}]"
        if kind == 11:
            return f"({e()} if {e()} else {e()})"
        return self.pick(f"[{e()}, {e()}]", f"{{'k': {e()}}}", f"({e()},)", f"dict(a={e()})", f"m({e()})", f"m({e()}, b={e()})")

    def tag(self, text):
        return "{%" + self.pick("", "", "-", "+") + " " + text + " " + self.pick("", "", "-") + "%}"

    def statement(self, depth):
        body = lambda: self.body(depth - 1)
        kind = self.rng.randrange(11) if depth > 0 else self.rng.randrange(3)
        if kind <= 1:
            return "{{" + self.pick("", "", "-") + " " + self.expression(2) + " " + self.pick("", "", "-") + "}}"
        if kind == 2:
            return self.pick("text ", "x\n", "{# c #}", "{#- c -#}", "\n\n", " y")
        if kind == 3:
            middle = self.pick("", self.tag("else") + body(), self.tag(f"elif {self.expression(1)}") + body())
            return self.tag(f"if {self.expression(1)}") + body() + middle + self.tag("endif")
        if kind == 4:
            jump = self.tag(f"if {self.expression(1)}") + self.pick(self.tag("break"), self.tag("continue")) + self.tag("endif")
            inner = body() + self.pick("", "{{ loop.index }}{{ loop.last }}", jump)
            head = f"for i in {self.pick('messages', '[1,2,3]', 'range(3)', self.rng.choice(LITERALS))}{self.pick('', '', ' if i')}"
            return self.tag(head) + inner + self.pick("", self.tag("else") + body()) + self.tag("endfor")
        if kind == 5:
            return self.tag(f"set {self.pick('x', 'y', 'i')} = {self.expression(2)}")
        if kind == 6:
            return self.tag(f"set ns.v = {self.expression(1)}")
        if kind == 7:
            return self.tag("set x" + self.pick("", " | upper", " | trim | title")) + body() + self.tag("endset")
        if kind == 8:
            return self.tag(f"with x = {self.expression(1)}, z = 2") + body() + self.tag("endwith")
        if kind == 9:
            return self.tag("filter " + self.pick("upper", "trim", "title|replace('A','b')")) + body() + self.tag("endfilter")
        return self.tag(f"macro {self.pick('m', 'g')}(a, b={self.expression(1)})") + body() + self.tag("endmacro")

    def body(self, depth):
        blank = lambda: self.pick("", " ", "\n", "  \n  ", "\t")
        return "".join(blank() + self.statement(depth) + blank() for _ in range(self.rng.randint(1, 3)))


def make(seed, n):
    grammar = Grammar(seed)
    head = "{% set ns = namespace(v=1) %}{% macro m(a, b=2) %}<{{ a }},{{ b }}>{% endmacro %}"
    return [head + ("{{ " + grammar.expression(3) + " }}" if i % 2 else grammar.body(2)) for i in range(n)]
