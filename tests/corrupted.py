"""Corrupted variants of a good artifact, a folder each: none of them may be loaded, served or signed.

    for name, path in variants(good, into): ...

The first word of a name is the family. The families ``json``, ``config``, ``posterior``, ``calibration``, ``tensor``, ``scale`` and
``safetensors`` have a manifest that describes the corrupted files correctly, so that the content alone gives them away; the others keep the
manifest of the good artifact, or damage the manifest itself.
"""

import hashlib
import json
import os
import pickle
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
MEAN_CONFIG, MEAN = "adapter_config.json", "adapter_model.safetensors"
POSTERIOR_CONFIG, POSTERIOR = "posterior.json", "posterior.safetensors"
CALIBRATION, METRICS = "calibration.json", "metrics.json"
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
OVERSIZE = 16 * 2**20 + 1

Change = Callable[[Path], object]
"""Corrupts a fresh copy of the good artifact; of the family ``place`` it returns where the variant is."""


def variants(good: Path, into: Path) -> Iterator[tuple[str, Path]]:
    """Yields every variant of an unsigned or signed artifact: its name and its path below ``into``."""
    yield from _made(good, into, (*_files(good), *_manifests(good), *_contents(good), *_posteriors(good)))


def posterior_variants(good: Path, into: Path) -> Iterator[tuple[str, Path]]:
    """Yields those variants that differ between kinds of posterior: its tensors, scales and settings."""
    yield from _made(good, into, _posteriors(good))


def signature_variants(
    good: Path, other: Path, into: Path, stranger: Callable[[Path], object]
) -> Iterator[tuple[str, Path]]:
    """Yields variants that only a required signature gives away: good artifacts that are not signed, or not by the right key.

    Args:
        good: an artifact signed by a trusted key.
        other: another one, signed by the same key.
        stranger: signs a folder with a key that is not trusted.
    """
    yield from _made(good, into, _signatures(good, other, stranger))


def fingerprint(path: Path) -> tuple[object, ...]:
    """What tells two folders apart: kinds, link targets and bytes of everything in them."""
    if not os.path.lexists(path):
        return ("nothing",)
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return ("link", os.readlink(path))
    if stat.S_ISDIR(mode):
        return ("folder", *((child.name, fingerprint(child)) for child in sorted(path.iterdir())))
    size = path.stat().st_size
    readable = stat.S_ISREG(mode) and size < 2**30  # one variant has a terabyte of nothing
    return (stat.S_IFMT(mode), size, _digest(path) if readable else None)


def describe(path: Path) -> dict[str, Any]:
    """A manifest entry, from the bytes themselves."""
    data = path.read_bytes()
    tensors = {}
    if path.suffix == ".safetensors":
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tensors = {
                name: [DTYPES[info["dtype"]], info["shape"]] for name, info in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # it is damaged so that no tensor can be described
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": tensors}


def write_manifest(folder: Path) -> None:
    """Rewrites the manifest so that it describes the files as they are: what is left is refused for its content."""
    names = [path.name for path in folder.iterdir() if path.name not in (MANIFEST, SIGNATURE)]
    document = {"format_version": 1, "files": {name: describe(folder / name) for name in names}}
    (folder / MANIFEST).write_text(json.dumps(document))


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON document."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _made(good: Path, into: Path, changes: Any) -> Iterator[tuple[str, Path]]:
    into.mkdir(parents=True, exist_ok=True)
    for number, (name, change) in enumerate(changes):
        folder = into / f"{number:04d}"
        shutil.copytree(good, folder)
        try:
            made = change(folder)
        except PermissionError:
            shutil.rmtree(folder)  # a device, which only root can make
            continue
        yield name, made if isinstance(made, Path) and name.startswith("place ") else folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _names(good: Path) -> list[str]:
    return sorted(path.name for path in good.iterdir() if path.name not in (MANIFEST, SIGNATURE))


# --- files that are not what the manifest says ---


def _files(good: Path) -> Iterator[tuple[str, Change]]:
    names = [*_names(good), MANIFEST]
    for name in names:
        size = (good / name).stat().st_size
        count = 24 if name == MANIFEST else 6
        for step in range(count):
            offset, bit = step * (size - 1) // (count - 1), (0, 7, 3)[step % 3]
            yield f"flip {name} byte {offset} bit {bit}", partial(_flip, name=name, offset=offset, bit=bit)
        for length in (0, 1, size // 2, size - 2):
            yield f"truncate {name} to {length}", partial(_edit, name=name, edit=lambda data, n=length: data[:n])
        for tail in (b"\0", b"{}", b"\0" * 4096):
            yield f"append {name} {len(tail)}", partial(_edit, name=name, edit=lambda data, t=tail: data + t)
        yield f"missing {name}", partial(_replace, name=name, make=lambda path: None)
        yield f"symlink {name} to its bytes elsewhere", partial(_link_out, name=name)
        yield f"symlink {name} dangling", partial(_replace, name=name, make=lambda p: p.symlink_to("nowhere"))
        yield f"symlink {name} to itself", partial(_replace, name=name, make=lambda p: p.symlink_to(p.name))
        yield f"special {name} folder", partial(_replace, name=name, make=Path.mkdir)
        yield f"special {name} fifo", partial(_replace, name=name, make=os.mkfifo)
    yield f"special {MEAN} socket", partial(_replace, name=MEAN, make=_make_socket)
    yield f"special {MEAN} device", partial(_replace, name=MEAN, make=_make_zero)
    yield f"special {MANIFEST} device", partial(_replace, name=MANIFEST, make=_make_zero)
    yield f"special {MEAN} hard link", partial(_replace, name=MEAN, make=_link_to_another_file)
    yield (
        f"special {POSTERIOR_CONFIG} without rights",
        partial(_replace, name=POSTERIOR_CONFIG, make=_make_without_rights),
    )
    yield f"special {POSTERIOR} of a terabyte", lambda folder: os.truncate(folder / POSTERIOR, 2**40)
    pairs = ((MEAN, POSTERIOR), (MEAN_CONFIG, POSTERIOR_CONFIG), (MANIFEST, POSTERIOR_CONFIG), (MANIFEST, MEAN))
    for one, two in pairs:
        yield f"swap {one} {two}", partial(_swap, one=one, two=two)
    yield "place nothing", lambda folder: folder / "nothing"
    yield "place empty folder", partial(_elsewhere, make=Path.mkdir)
    yield "place file", partial(_elsewhere, make=lambda path: path.write_text("{}"))
    yield "place fifo", partial(_elsewhere, make=os.mkfifo)
    yield "place dangling link", partial(_elsewhere, make=lambda path: path.symlink_to("nowhere"))
    yield "place link to the good artifact", partial(_elsewhere, make=lambda path: path.symlink_to(good.absolute()))
    yield "place inside another folder", _nested
    yield "place manifest itself", lambda folder: folder / MANIFEST
    yield "place name too long", lambda folder: folder / ("a" * 300)
    yield "place name with a zero byte", lambda folder: Path(f"{folder}\0x")
    for extra in (
        "adapter_model.bin",
        "pytorch_model.pt",
        "weights.PTH",
        "state.pkl",
        "data.pickle",
        "model.ckpt",
        "a.npz",
    ):
        yield f"extra {extra}", partial(_edit, name=extra, edit=lambda data: pickle.dumps({"w": 1}))
    for extra in ("model.safetensors", "modeling.py", "kernel.so", "model.gguf", "head.safetensors"):
        yield f"extra {extra}", partial(_edit, name=extra, edit=lambda data: b"")


def _edit(folder: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(edit(path.read_bytes() if path.exists() else b""))


def _flip(folder: Path, name: str, offset: int, bit: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[offset] ^= 1 << bit
    (folder / name).write_bytes(data)


def _replace(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    make(folder / name)


def _link_out(folder: Path, name: str) -> None:
    outside = folder.with_name(f"{folder.name}-{name}")
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside.absolute())


def _make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _make_zero(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def _link_to_another_file(path: Path) -> None:
    path.hardlink_to(path.with_name(POSTERIOR))


def _make_without_rights(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def _swap(folder: Path, one: str, two: str) -> None:
    (folder / one).rename(folder / "between")
    (folder / two).rename(folder / one)
    (folder / "between").rename(folder / two)


def _elsewhere(folder: Path, make: Callable[[Path], object]) -> Path:
    path = folder.with_name(f"{folder.name}-place")
    make(path)
    return path


def _nested(folder: Path) -> Path:
    outer = folder.with_name(f"{folder.name}-outer")
    outer.mkdir()
    shutil.copytree(folder, outer / "artifact")
    return outer


# --- the manifest ---


def _manifests(good: Path) -> Iterator[tuple[str, Change]]:
    document = json.loads((good / MANIFEST).read_text())
    some = document["files"][MEAN]

    def edited(change: Callable[[dict[str, Any]], object]) -> Change:
        def write(folder: Path) -> None:
            copy = json.loads(json.dumps(document))
            change(copy)
            (folder / MANIFEST).write_text(json.dumps(copy))

        return write

    outside = (
        "../outside",
        "..",
        ".",
        "/etc/passwd",
        "sub/x.json",
        "./posterior.json",
        "..\\x",
        "a\0b",
        "",
        "tokenizer.json",
    )
    for name in outside:
        yield f"manifest lists {name!r}", edited(lambda d, n=name: d["files"].update({n: some}))
    for name in (MEAN, MEAN_CONFIG, POSTERIOR, POSTERIOR_CONFIG):
        yield f"manifest leaves out {name}", edited(lambda d, n=name: d["files"].pop(n))
        yield f"manifest moves {name}", edited(lambda d, n=name: d["files"].update({f"../{n}": d["files"].pop(n)}))
    if CALIBRATION in document["files"]:
        yield f"manifest leaves out {CALIBRATION}", edited(lambda d: d["files"].pop(CALIBRATION))
    fields: list[tuple[str, object]] = [
        *(("size", value) for value in (-1, 0, some["size"] + 1, 2**63, 1e308, float(some["size"]), str(some["size"]), None, True)),
        *(("sha256", value) for value in ("", "0" * 64, some["sha256"].upper() + "g", some["sha256"][:-1], None, 5)),
        *(("tensors", value) for value in ({}, None, [], {"x": ["float32", [1]]}, {"x": "float32"})),
        ("mode", 0o777),
    ]  # fmt: skip
    for key, value in fields:
        yield f"manifest entry {key} {value!r}", edited(lambda d, k=key, v=value: d["files"][MEAN].update({k: v}))
    tensor = next(iter(some["tensors"]))
    shape = some["tensors"][tensor][1]
    for entry in (
        ["float16", shape],
        ["float32", shape[::-1] + [1]],
        ["float32", [2**62, 4]],
        ["float32", [-1, 1]],
        "float32",
    ):
        yield f"manifest tensor {entry!r}", edited(lambda d, e=entry: d["files"][MEAN]["tensors"].update({tensor: e}))
    yield (
        "manifest entries exchanged",
        edited(lambda d: d["files"].update({MEAN: d["files"][POSTERIOR], POSTERIOR: some})),
    )
    for version in (0, 2, "1", True, 1.0, None, [1], 10**400):
        yield f"manifest version {str(version)[:9]!r}", edited(lambda d, v=version: d.update(format_version=v))
    for files in ({}, [], None, "x", [some]):
        yield f"manifest files {str(files)[:9]!r}", edited(lambda d, f=files: d.update(files=f))
    yield "manifest unknown key", edited(lambda d: d.update(auto_map={}))
    for name, data in _no_documents((good / MANIFEST).read_bytes()):
        yield f"manifest {name}", partial(_edit, name=MANIFEST, edit=lambda _, d=data: d)


def _no_documents(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no JSON object, or one that programs read in different ways."""
    text = data.decode()
    first = text.index('"')
    key, value = next(iter(json.loads(data).items()))
    twice = text[: text.index("{") + 1] + f"{json.dumps(key)}: {json.dumps(value)}, " + text[first:]
    yield "nonsense", b"nonsense"
    yield "list", b"[1]"
    yield "number", b"1"
    yield "null", b"null"
    yield "UTF-16", text.encode("utf-16")
    yield "byte order mark", b"\xef\xbb\xbf" + data
    yield "not UTF-8", data[:first] + b'"\xff": 1, ' + data[first:]
    yield "half a surrogate pair", data[:first] + b'"a": "\\ud800", ' + data[first:]
    yield "key twice", twice.encode()
    yield "deep", data[:first] + b'"a": ' + b"[" * 100 + b"]" * 100 + b", " + data[first:]
    yield "very deep", b"[" * 200_000
    yield "very deep object", b'{"a":' * 50_000
    yield "NaN", data[:first] + b'"a": NaN, ' + data[first:]
    yield "infinite", data[:first] + b'"a": -Infinity, ' + data[first:]
    yield "1e999", data[:first] + b'"a": 1e999, ' + data[first:]
    yield "many digits", data[:first] + b'"a": ' + b"1" * 5000 + b", " + data[first:]
    yield "two documents", data + data
    yield "comment", b"// comment\n" + data
    yield "oversize", data + b" " * OVERSIZE


# --- content, with a manifest that describes it correctly ---


def _contents(good: Path) -> Iterator[tuple[str, Change]]:
    for name in (MEAN_CONFIG, POSTERIOR_CONFIG, CALIBRATION, METRICS):
        if (good / name).exists():
            for what, data in _no_documents((good / name).read_bytes()):
                yield f"json {name} {what}", _honest(partial(_edit, name=name, edit=lambda _, d=data: d))
    for name in ("README.md", "config.yaml"):
        if (good / name).exists():
            yield f"json {name} not UTF-8", _honest(partial(_edit, name=name, edit=lambda data: data + b"\xff"))
    config = json.loads((good / MEAN_CONFIG).read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    adapter: list[tuple[str, Any]] = [
        ("modules_to_save", ["lm_head"]), ("auto_mapping", {"base_model_class": "X"}), ("auto_map", {"AutoModel": "x.py"}),
        ("trust_remote_code", True), ("peft_type", "IA3"), ("peft_type", None), ("peft_type", "lora"), ("bias", "all"), ("use_dora", True),
        ("use_rslora", True), ("lora_bias", True), ("fan_in_fan_out", True), ("rank_pattern", {"q_proj": 1}), ("alpha_pattern", {"k": 1}),
        ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]), ("target_parameters", ["w"]), ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [5]), ("use_qalora", True), ("some_new_setting", 1), ("task_type", "SEQ_CLS"),
        *(("r", value) for value in (0, -1, rank + 1, rank - 1, float(rank), str(rank), True, None, 2**70, [rank])),
        *(("lora_alpha", value) for value in (0, -alpha, alpha + 1, str(alpha), None, True)),
        *(("target_modules", value) for value in (None, 5, [], [1], ["no_such_module"], {"q_proj": 1})),
    ]  # fmt: skip
    for key, value in adapter:
        yield (
            f"config {key} {value!r}",
            _honest(lambda folder, k=key, v=value: edit_json(folder / MEAN_CONFIG, **{k: v})),
        )
    posterior: list[tuple[str, Any]] = [
        *(("format_version", value) for value in (0, 2, "1", True, 1.0, None)),
        *(("rank", value) for value in (0, -1, rank + 1, str(rank), float(rank) + 0.5, True, None)),
        *(("lora_alpha", value) for value in (0, -alpha, alpha + 1, str(alpha), None)),
        *(("default_seed", value) for value in (-1, 1.5, "0", True, None)),
        *(("target_modules", value) for value in (None, "q_proj", [], [1], ["no_such_module"])),
        *(("base_model", value) for value in (None, "tiny", {}, {"name": 5}, {"name": "a", "url": "b"})),
        *(("tau", value) for value in (None, {"x": {"value": 1, "nll": 0}}, {"8": {"value": -1, "nll": 0}}, {"8": {"value": 1}}, {"8": 1})),
        *(("tau", {key: {"value": 1, "nll": 0}}) for key in ("-8", "0", "8.5", "")),
        ("tau", {"8": {"value": "1", "nll": 0}}), ("tau", {"8": {"value": 1, "nll": 0, "curve": [[1, 2]]}}),
        ("generator", "torch"), ("method", 5), ("method", None), ("credence_version", None), ("kind", "horseshoe"), ("kind", None),
        ("mean", "second member"), ("auto_map", {}), ("training", [1]),
    ]  # fmt: skip
    for key, value in posterior:
        yield (
            f"posterior {key} {value!r}",
            _honest(lambda folder, k=key, v=value: edit_json(folder / POSTERIOR_CONFIG, **{k: v})),
        )
    fit = {"value": 1.5, "nll": 0.5}
    fitted = {"rows": 2, "correct": 1, "nll": {"before": 1, "after": 1}, "brier": {"before": 1, "after": 1}}
    platt = {"kind": "platt", "slope": 1.0, "intercept": 0.0, **fitted}
    calibration: list[tuple[str, Any]] = [
        *(("temperature", {"8": {**fit, "value": value}}) for value in (0, -1, "1", None, True)),
        *(("temperature", {key: fit}) for key in ("x", "-1", "1.5")),
        ("temperature", []), ("temperature", {"8": {**fit, "sd": 1}}), ("temperatures", {}),
        *(("maps", {"8": {**platt, key: value}}) for key, value in (("slope", -1.0), ("kind", "beta"), ("rows", 0), ("temperature", 0.5))),
        ("maps", {"-1": platt}), ("maps", {"8": {**fitted, "kind": "isotonic", "knots": []}}),
        ("maps", {"8": {**fitted, "kind": "isotonic", "knots": [[0, 0.5], [1, 0.4]]}}),
        ("maps", {"8": {**fitted, "kind": "isotonic", "knots": [[0, 0.5], [1, 1.5]]}}),
    ]  # fmt: skip
    for key, value in calibration:
        yield f"calibration {key} {str(value)[:60]}", _honest(partial(_set_calibration, key=key, value=value))
    for name, tensor in sorted(load_file(good / MEAN).items()):
        yield from _tensor_changes(MEAN, name, tensor)
    yield from _mean_changes(good)
    for file in (MEAN, POSTERIOR):
        yield from _safetensors(good, file)


def _honest(change: Change) -> Change:
    def corrupt(folder: Path) -> None:
        change(folder)
        write_manifest(folder)

    return corrupt


def _set_calibration(folder: Path, key: str, value: object) -> None:
    path = folder / CALIBRATION
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, key: value}))


def _tensor_changes(file: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Change]]:
    """What no tensor of an artifact may be: not finite, of another dtype or shape, absent, or under another name."""
    short = name.removeprefix("base_model.model.")

    def made(what: str, make: Callable[[Tensor], Tensor]) -> tuple[str, Change]:
        def change(folder: Path) -> None:
            edit_tensors(folder / file, lambda tensors: tensors.update({name: make(tensors[name])}))

        return f"tensor {short} {what}", _honest(change)

    for value in (float("nan"), float("inf"), -float("inf")):
        yield made(str(value), partial(_with_entry, value=value))
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int8,
        torch.bool,
    ):
        yield made(str(dtype), lambda t, d=dtype: t.to(d))
    yield made("scalar", lambda t: t.flatten()[0])
    yield made("flat", lambda t: t.flatten()[None, :, None])
    yield made("one more dimension", lambda t: t[None])
    yield made("without entries", lambda t: t[..., :0])
    yield made("without rows", lambda t: t[:0])
    if not name.endswith("beta"):  # its length, the number of mixture components, is its own
        yield made("longer", lambda t: torch.cat([t, t], dim=-1))
    yield f"tensor {short} absent", _honest(lambda folder: edit_tensors(folder / file, lambda t: t.pop(name)))
    for other in (f"{name}_", f"x.{name}", name.upper(), f"../{name}", name.rpartition(".")[2]):
        yield (
            f"tensor {short} as {other}",
            _honest(lambda folder, o=other: edit_tensors(folder / file, lambda t: t.update({o: t.pop(name)}))),
        )


def _with_entry(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def _mean_changes(good: Path) -> Iterator[tuple[str, Change]]:
    prefix = "base_model.model."
    some = sorted(load_file(good / MEAN).items())
    a = next(tensor for name, tensor in some if name.endswith("lora_A.weight"))
    b = next(tensor for name, tensor in some if name.endswith("lora_B.weight"))
    additions: dict[str, dict[str, Tensor]] = {
        "lm_head.weight": {f"{prefix}lm_head.weight": a},
        "lm_head as LoRA": {f"{prefix}lm_head.lora_A.weight": a, f"{prefix}lm_head.lora_B.weight": b},
        "embedding": {
            f"{prefix}model.embed_tokens.lora_embedding_A": a,
            f"{prefix}model.embed_tokens.lora_embedding_B": b,
        },
        "saved module": {f"{prefix}model.norm.modules_to_save.default.weight": a[0]},
        "DoRA magnitude": {f"{prefix}model.layers.0.self_attn.q_proj.lora_magnitude_vector": a[0]},
        "bias": {f"{prefix}model.layers.0.self_attn.q_proj.lora_B.bias": a[0]},
    }
    for what, tensors in additions.items():
        yield (
            f"tensor added {what}",
            _honest(lambda folder, t=tensors: edit_tensors(folder / MEAN, lambda all: all.update(t))),
        )
    for what, grow in (
        ("more", lambda t, dim: torch.cat([t, t], dim=dim)),
        ("less", lambda t, dim: t.narrow(dim, 0, t.shape[dim] - 1)),
    ):
        yield f"tensor {what} rank than said", _honest(partial(_change_rank, grow=grow))
    yield "tensor no LoRA at all", _honest(lambda folder: save_file({}, folder / MEAN))
    for one, two in ((MEAN, POSTERIOR), (MEAN_CONFIG, POSTERIOR_CONFIG)):
        yield f"tensor files exchanged {one}", _honest(partial(_swap, one=one, two=two))
    yield (
        "tensor head of a model that has none",
        _honest(lambda folder: save_file({"classifier.weight": torch.ones(2, 2)}, folder / "head.safetensors")),
    )


def _change_rank(folder: Path, grow: Callable[[Tensor, int], Tensor]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = grow(tensor, 0 if "lora_A" in name else 1)

    edit_tensors(folder / MEAN, change)


def _safetensors(good: Path, file: str) -> Iterator[tuple[str, Change]]:
    """Files that are no safetensors, or whose header lies about what follows."""
    data = (good / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def build(changed: dict[str, Any] | bytes, size: int | None = None, tail: bytes = b"") -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return (len(text) if size is None else size).to_bytes(8, "little") + text + body + tail

    raw: dict[str, bytes] = {
        "empty": b"",
        "seven bytes": data[:7],
        "pickle": pickle.dumps({"w": 1}),
        "zip": b"PK\x03\x04" + bytes(100),
        "header only": data[: 8 + length],
        "header of 8 EiB": build(header, 2**63),
        "header of all ones": build(header, 2**64 - 1),
        "header of 100 MB and more": build(header, 100_000_001),
        "header longer than the file": build(header, len(data)),
        "header of no bytes": build(header, 0),
        "header too short": build(header, length // 2),
        "header nonsense": build(b"nonsense"),
        "header list": build(b"[]"),
        "header not UTF-8": build(b"\xff" * 10),
        "header very deep": build(b'{"a":' * 10_000),
        "metadata of numbers": build({**header, "__metadata__": {"a": 1}}),
        "bytes after the tensors": build(header, tail=b"\0" * 16),
    }
    for name in names[:1]:
        entry, (start, end) = header[name], header[name]["data_offsets"]

        def with_entry(name: str = name, entry: dict[str, Any] = entry, **changes: Any) -> bytes:
            return build({**header, name: {**entry, **changes}})

        text = json.dumps(header)
        raw |= {
            "offsets beyond the end": with_entry(data_offsets=[start, end + 2**40]),
            "offsets reversed": with_entry(data_offsets=[end, start]),
            "offsets negative": with_entry(data_offsets=[-4, end]),
            "offsets of another tensor": with_entry(data_offsets=[start + 4, end + 4]),
            "shape huge": with_entry(shape=[2**40, 2**20]),
            "shape overflows": with_entry(shape=[2**62, 4]),
            "shape negative": with_entry(shape=[-1, -4]),
            "shape one larger": with_entry(shape=[entry["shape"][0] + 1, *entry["shape"][1:]]),
            "dtype unknown": with_entry(dtype="F31"),
            "dtype of twice the size": with_entry(dtype="F64"),
            "dtype of other numbers": with_entry(dtype="I32"),
            "dtype missing": build({**header, name: {"shape": entry["shape"], "data_offsets": [start, end]}}),
            "tensor twice": build(("{" + json.dumps(name) + ": " + json.dumps(entry) + ", " + text[1:]).encode()),
        }
    for what, content in raw.items():
        yield f"safetensors {file} {what}", _honest(partial(_edit, name=file, edit=lambda _, c=content: c))


# --- the posterior, by its own tensors and settings ---


def _posteriors(good: Path) -> Iterator[tuple[str, Change]]:
    tensors = load_file(good / POSTERIOR)
    config = json.loads((good / POSTERIOR_CONFIG).read_text())
    module = ""
    for name, tensor in sorted(tensors.items()):
        own, _, parameter = name.rpartition(".")
        module = module or own
        if own == module:  # one module says as much as all
            changes = _tensor_changes(POSTERIOR, name, tensor)
            yield from (item for item in changes if not _is_another_posterior(item[0], parameter))
            for what, make in _bad_scales(parameter):
                yield (
                    f"scale {parameter} {what}",
                    _honest(
                        lambda folder, n=name, m=make: edit_tensors(
                            folder / POSTERIOR, lambda t: t.update({n: m(t[n])})
                        )
                    ),
                )
    for kind in ("point", "diag", "row", "core", "lowrank", "mask", "ensemble"):
        if kind != config["kind"]:
            yield f"posterior kind {kind}", _honest(lambda folder, k=kind: edit_json(folder / POSTERIOR_CONFIG, kind=k))
    bad_settings: dict[str, tuple[float, ...]] = {
        "epsilon": (0.0, -0.3), "dof": (0.0, -1.0), "floor": (-1e-3,), "p": (0.0, 1.0, -0.1, 1.5), "prior_log_sd": (1e3, -1e3),
    }  # fmt: skip
    settings = config["settings"]
    for key in settings:
        for value in (*bad_settings[key], "1", None, True):
            yield f"scale {key} {value!r}", _honest(partial(_set_settings, settings={**settings, key: value}))
        left = {other: settings[other] for other in settings if other != key}
        yield f"scale {key} absent", _honest(partial(_set_settings, settings=left))
    yield "scale unknown setting", _honest(partial(_set_settings, settings={**settings, "sigma": 1.0}))
    for member in ({"kind": "ensemble"}, {"kind": "row"}, {"kind": "diag", "settings": {"sigma": 1.0}}, {}, "diag"):
        yield (
            f"posterior member {member}",
            _honest(lambda folder, m=member: edit_json(folder / POSTERIOR_CONFIG, member=m)),
        )
    if tensors:
        yield "tensor posterior of no module", _honest(lambda folder: save_file({}, folder / POSTERIOR))
    else:
        extra = {"model.layers.0.self_attn.q_proj.log_sd_A": torch.zeros(3, 3)}
        yield "tensor posterior that has none", _honest(lambda folder: save_file(extra, folder / POSTERIOR))


def _set_settings(folder: Path, settings: dict[str, object]) -> None:
    edit_json(folder / POSTERIOR_CONFIG, settings=settings)


def _is_another_posterior(name: str, parameter: str) -> bool:
    """Whether a change leaves another valid posterior: noise on one factor alone is one."""
    return parameter.removeprefix("member_") in ("log_sd_A", "log_sd_B") and name.endswith(" absent")


def _bad_scales(parameter: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    if parameter.removeprefix("member_").startswith(("log_sd", "rho")):
        yield "overflows", lambda t: t + 1e3
        yield "overflows in one entry", partial(_with_entry, value=100.0)
    if parameter == "beta":
        yield "without concentration", lambda t: t - 1e3
    if parameter.endswith("_values"):
        yield "negative", lambda t: -t - 1
        yield "negative in one entry", partial(_with_entry, value=-1e-3)
    if parameter.endswith("_vectors"):
        yield "not orthonormal", lambda t: t * 1.01
        yield "zero", torch.zeros_like
    if parameter == "M":
        yield "singular", torch.zeros_like
        yield "nearly singular", lambda t: torch.ones_like(t) + 1e-9 * t


# --- signatures ---


def _signatures(good: Path, other: Path, stranger: Callable[[Path], object]) -> Iterator[tuple[str, Change]]:
    document = json.loads((good / SIGNATURE).read_text())
    size = (good / SIGNATURE).stat().st_size
    foreign = json.loads((other / SIGNATURE).read_text())
    yield "unsigned signature missing", lambda folder: (folder / SIGNATURE).unlink()
    yield "signature of a stranger", stranger
    yield (
        "signature of a stranger under a trusted name",
        partial(_stranger_in_disguise, stranger=stranger, key_id=document["key_id"]),
    )
    yield "signature of another artifact", lambda folder: shutil.copy(other / SIGNATURE, folder / SIGNATURE)
    yield "signature stays, artifact exchanged", partial(_exchange, other=other)
    yield "signature stays, manifest rewritten", write_manifest
    yield (
        "signature stays, one number changed honestly",
        _honest(lambda folder: edit_json(folder / POSTERIOR_CONFIG, default_seed=1)),
    )
    for offset in range(0, size, 7):
        yield f"signature flipped byte {offset}", partial(_flip, name=SIGNATURE, offset=offset, bit=offset % 8)
    edits: list[dict[str, object]] = [
        {"algorithm": "none"}, {"algorithm": "ED25519"}, {"algorithm": None}, {"key_id": ""}, {"key_id": "0" * 16}, {"key_id": None},
        {"signature": ""}, {"signature": "A" * 86 + "=="}, {"signature": None}, {"signature": foreign["signature"]}, {"extra": 1},
        {"signature": document["signature"] + "\n"}, {"signature": document["signature"].rstrip("=")},
    ]  # fmt: skip
    for edit in edits:
        yield f"signature {str(edit)[:50]}", lambda folder, e=edit: edit_json(folder / SIGNATURE, **e)
    for name, data in _no_documents((good / SIGNATURE).read_bytes()):
        yield f"signature {name}", partial(_edit, name=SIGNATURE, edit=lambda _, d=data: d)
    yield "signature symlink", partial(_link_out, name=SIGNATURE)
    yield "signature fifo", partial(_replace, name=SIGNATURE, make=os.mkfifo)


def _stranger_in_disguise(folder: Path, stranger: Callable[[Path], object], key_id: str) -> None:
    stranger(folder)
    edit_json(folder / SIGNATURE, key_id=key_id)


def _exchange(folder: Path, other: Path) -> None:
    signature = (folder / SIGNATURE).read_bytes()
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    (folder / SIGNATURE).write_bytes(signature)
