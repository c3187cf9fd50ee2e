"""export and quantize: what one writes the other reads, and a model that went through both gives the same logits."""
import json
import struct

from harness import Cluster, folder, run_cases, tiny_model

work = folder("export")
source = tiny_model(work, type="F32")
cluster = Cluster(start=False)
weft = cluster.weft


def digest(path):
    return weft("run", path, "-p", "weft", "-n", 4, "--up", 1, "--json", "-q").ok().json()["digest"]


def case_round_trip():
    """GGUF to a Hugging Face directory and back: the same digest"""
    made = weft("export", source, work / "hf", "--json", "-q").ok().json()
    assert made["format"] == "huggingface" and made["type"] == "F32" and made["tokenizer"] and made["bytes"] > 0, made
    names = sorted(p.name for p in (work / "hf").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], names
    config = json.loads((work / "hf" / "config.json").read_text())
    assert "bos_token_id" in config and "eos_token_id" in config, config  # null, else transformers takes those of another model
    weft("quantize", work / "hf", work / "back.gguf", "f32").ok()
    assert digest(work / "back.gguf") == digest(source)


def case_types():
    """every type is written and served"""
    sizes = {}
    for name in ("f16", "bf16", "Q8_0", "q4_1", "Q4_0"):
        made = weft("quantize", source, work / f"{name.lower()}.gguf", name, "--json").ok().json()
        assert made["format"] == "gguf" and made["type"] == name.upper(), made
        sizes[name.lower()] = made["bytes"]
    assert sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q4_1"] > sizes["q4_0"], sizes
    assert digest(work / "q8_0.gguf") != digest(work / "q4_0.gguf")


def case_same_bytes():
    """the same input gives the same file, and a file that is there is replaced"""
    weft("export", source, work / "a.gguf", "--type", "q8_0").ok()
    weft("export", source, work / "b.gguf", "--type", "q4_0").ok()
    weft("export", source, work / "b.gguf", "--type", "Q8_0").ok()
    assert (work / "a.gguf").read_bytes() == (work / "b.gguf").read_bytes()


def case_dry_run():
    """--dry-run writes nothing"""
    out = weft("quantize", source, work / "never.gguf", "q8_0", "--dry-run").ok().out
    assert "never.gguf" in out and not (work / "never.gguf").exists()


def case_bad_input():
    """what cannot be written is refused by name, and nothing is left"""
    weft("quantize", source, work / "x.gguf", "q9").fails(2, "type 'q9' is unknown")
    weft("quantize", source, work / "x", "q8_0").fails(2, "end in .gguf")
    weft("quantize", source, "q8_0").fails(2, "are expected")
    weft("export", source, work / "x", "--type", "q8_0").fails(2, "Hugging Face directory")
    weft("export", source, source).fails(2, "read and written at once")
    weft("export", work / "none.gguf", work / "x").fails(3, "none.gguf")
    weft("export", work, work / "x").fails(3, "no config.json")
    weft("export", source, "/nonexistent/x.gguf", "-q").fails(1, "/nonexistent/x.gguf")
    (work / "config").mkdir()
    (work / "config" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    weft("export", work / "config", work / "x").fails(2, "model_type 'bert'")
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}'
    (work / "config" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}))
    (work / "config" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    weft("export", work / "config", work / "x").fails(2, "lies at 0 to 99")
    assert not (work / "x").exists() and not (work / "x.gguf").exists()


run_cases([case_round_trip, case_types, case_same_bytes, case_dry_run, case_bad_input])
