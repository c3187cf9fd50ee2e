"""Texts that tokenizers get wrong, and random ones made of the same material. Reproducible."""
import random

AWKWARD = [
    "", " ", "  ", "\n", "\t", "\r\n", "a", "Hello, world!", " Hello  world ", "hello   \n\n  world\t\tend", "\n\n\n", "   \n", "x\r\ny\r\n\r\nz",
    "I'm you're he'll we've it's I'd can't DON'T I'LL We'Ve '\u017f 'S 's' ''s", "1", "12", "123", "1234567890", "3.14159 1,000,000 0x1F 2nd 1st",
    "a1b22c333 4444", "  7", "\u0661\u0662\u0663\u0664 \u0967\u0968 \u2167 \u00bd\u00b2 \u4e03",
    "\u00e9t\u00e9 na\u00efve \u00fcber \u00dfe \u1e9e \u0130\u0131", "e\u0301 e\u0316\u0301 e\u0301\u0316 \u1112\u1161\u11ab \ud55c\uae00 \u0958 \u2126 \u212b",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca\u3000\uff21\uff22\uff23 \uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05c1\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0 \u1218\u1295",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd x\U0001d4d0\U00020000",
    "\u200b\u200c\u200d\ufeff\u00ad\u2060 \u00a0\u2009\u202f\u3000\u180e\u0085\u2028\u2029x", "\u0000\u0001\u001b[31m\u007f", "a\u0300\u0301\u0302\u0303\u0304b",
    "def f(x):\n    if x > 0:\n        return x**2  # square\n\treturn None\n", "{\"key\": [1, 2.5e-3, null], \"s\": \"\\n\"}", "<div class='a'>&amp;</div> <!-- x -->",
    "https://example.org/a/b?c=d&e=%20#f user@example.org C:\\dir\\file.txt", "!!!??? ... ---- ==== ~~~~ $$$ +++ ^^^ ||| ``` \"\"\" ''' ((())) [[]] {{}}",
    "a!b?c.d,e;f:g-h_i/j\\k|l", " !x  !y   !!z", ".\n\n..\r\n...\n", "x \n y \n\n z", "\u2014em\u2014dash\u2026 \u201cquotes\u201d \u2018single\u2019 \u00abg\u00bb \u00a1\u00bf",
    "\u20ac100 \u00a350 \u00a5\uff11\uff12\uff13 50\u00b0C \u00b1\u00d7\u00f7\u221e\u2211", "CamelCaseString snake_case_string SCREAMING_CASE kebab-case",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore.", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the the the", "\u2581under\u2581score \u2581", "\u0120t \u010a\u0109 \u0142", "\u0800\u0900\u9fa5\u9fa6\uac00\ud7ff\u3040\u309f\u30ff", "\u01c5\u02b0\u1d2c\u16ee\u3007 \u0e51\u0e52",
]

SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "<|endoftext|><|endoftext|>", "a<|im_end|>b", " <|im_end|> ", "<|im_end|", "<|im_end|>>",
    "<<|im_end|>", "<|im_<|im_end|>end|>", "x  <|im_start|>  y", "<|im_start", "<|IM_END|>", "\n\n<|im_end|>\n\n", "<repo_name>a<file_sep>b", "<reponame><repo_name",
]

INVALID = [
    b"\x80", b"\xff\xfe", b"abc\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82 x", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"a\xffb\xffc 12\xff34",
    b"\xe2\x28\xa1\xf0\x90\x28\xbc", b"  \x80  ", b"\xc3\xa9\xc3\xc3\xa9", bytes(range(256)), bytes(range(255, -1, -1)),
]

PIECES = ["a", "b", "the", "The", "ing", "'s", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "1", "23", "4567", "\u0663", "\u2167", "\u00bd", ".", "!", "-", "_", "(", "\"", "$",
          "+", "=", "^", "|", "~", "`", "#", "\u00e9", "e\u0301", "\u0316", "\u00df", "\u017f", "\u0416", "\u03a9", "\u4f60", "\u597d", "\u3042", "\u30ab", "\ud55c", "\u0928\u094d",
          "\u0e33", "\u05d0", "\u0627", "\U0001f600", "\u200d", "\ufe0f", "\u00a0", "\u3000", "\u180e", "\u0085", "\u2028", "\u200b", "\u2581", "\u0120", "\u20ac", "\u2014",
          "\U0001d7d8", "\u0800", "\u9fa6", "\u01c5", "\u0000"]


def random_texts(seed, n, longest=24):
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, longest))) for _ in range(n)]


def corpus():
    """Training text of the small vocabularies."""
    return [t for t in AWKWARD for _ in range(3)] + random_texts(7, 300, 60)
