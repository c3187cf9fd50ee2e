"""Writes corpus/http_body and corpus/http_head: one file a case, by name. Run it in tests/fuzz."""
import json
import pathlib

CHAT, COMPLETION, TOKENIZE, DETOKENIZE = (bytes([i]) for i in range(4))
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
ALL = {"model": "m", "n": 2, "seed": -1, "stop": ["a", "bc"], "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
       "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "7": 3.5}, "ignore_eos": True, "user": "u"}


def text(**fields):
    return json.dumps(fields).encode()


bodies = {
    "chat": CHAT + text(messages=MESSAGES),
    "chat-all": CHAT + text(messages=MESSAGES, **ALL, max_completion_tokens=9, logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True}),
    "chat-tools": CHAT + text(messages=MESSAGES, tools=[{"type": "function"}]),
    "chat-image": CHAT + text(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    "chat-no-content": CHAT + text(messages=[{"role": "assistant", "content": None, "tool_calls": []}]),
    "completion": COMPLETION + text(prompt="x"),
    "completion-all": COMPLETION + text(prompt=["a", "b"], **ALL, echo=True, logprobs=4, best_of=2),
    "completion-ids": COMPLETION + text(prompt=[[1, 2], [3]], stream=True),
    "completion-no-tokens": COMPLETION + text(prompt=[1, 2], echo=True, max_tokens=0, logprobs=0),
    "tokenize": TOKENIZE + text(prompt="x", add_special_tokens=False),
    "tokenize-messages": TOKENIZE + text(messages=MESSAGES, add_generation_prompt=False),
    "detokenize": DETOKENIZE + text(tokens=[1, 2, 3]),
    "deep": CHAT + b'{"messages":' + b"[" * 5000,
    "deep-objects": CHAT + b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "deep-allowed": CHAT + b'{"messages":' + b"[" * 60 + b"]" * 60 + b"}",
    "many-values": COMPLETION + b'{"prompt":[' + b"1," * 60000 + b"1]}",
    "nan": COMPLETION + b'{"prompt":"x","temperature":NaN}',
    "infinity": COMPLETION + b'{"prompt":"x","temperature":-Infinity}',
    "overflow": COMPLETION + b'{"prompt":"x","temperature":1e999}',
    "int-max": COMPLETION + b'{"prompt":"x","n":9223372036854775807,"seed":-9223372036854775808}',
    "int-over": COMPLETION + b'{"prompt":"x","seed":9223372036854775808}',
    "negative": COMPLETION + b'{"prompt":"x","n":-1,"max_tokens":-9}',
    "utf8": COMPLETION + b'{"prompt":"\xff\xfe\xc0\xaf"}',
    "surrogate": COMPLETION + b'{"prompt":"\\ud800x"}',
    "nul": COMPLETION + b'{"prompt":"a\\u0000b"}',
    "twice": COMPLETION + b'{"prompt":"a","prompt":"b"}',
    "bias-twice": COMPLETION + b'{"prompt":"a","logit_bias":{"7":1,"007":2}}',
    "bias-keys": COMPLETION + b'{"prompt":"a","logit_bias":{"-1":1}}',
    "stop-empty": COMPLETION + b'{"prompt":"a","stop":""}',
    "types": COMPLETION + b'{"prompt":{"a":1},"stream":"yes","n":[1],"stop":7}',
    "array": CHAT + b"[]",
    "empty": CHAT,
    "nothing": b"",
}
heads = {
    "get": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "post": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    "chunked": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nTrailer: x\r\n\r\n",
    "chunk-huge": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    "chunk-bad": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "both-lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    "two-lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "length-negative": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "length-huge": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    "length-large": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4294967297\r\n\r\nx",
    "cut": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Le",
    "long-header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40000 + b"\r\n\r\n",
    "long-line": b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many-headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(3000)) + b"\r\n",
    "key": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer weft-key-0\r\nX-Request-Id: a\x01b\r\n\r\n",
    "key-blanks": b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: bearer      \r\n\r\n",
    "bytes": b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\x80\r\nContent-Type: \r\n\r\n",
    "percent": b"GET /%00%ff%zz?a=%00&b HTTP/1.1\r\nHost: x\r\n\r\n",
    "nul": b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "fold": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\tc\r\n\r\n",
    "bare-lf": b"GET / HTTP/1.1\nHost: x\n\n",
    "pipelined": b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "http10": b"GET / HTTP/1.0\r\n\r\n",
    "expect": b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    "upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(60),
    "method": b"\xff\xff / HTTP/1.1\r\nHost: x\r\n\r\n",
    "blank": b"\r\n\r\n\r\n",
    "nothing": b"",
}
for name, cases in (("http_body", bodies), ("http_head", heads)):
    folder = pathlib.Path("corpus") / name
    folder.mkdir(parents=True, exist_ok=True)
    for case, data in cases.items():
        (folder / case).write_bytes(data)
