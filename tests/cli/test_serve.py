"""`quadapt serve`: the servers of llama.cpp and transformers answer what `quadapt chat` answers, until Ctrl-C."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, byte_tokenizer, give, quadapt

from quadapt.config import ServeConfig
from quadapt.data import PromptForm
from quadapt.errors import DataError
from quadapt.exporters.llama_cpp import LlamaCpp
from quadapt.jobs import serve as serving
from quadapt.report.ui import UI

DEMO = Path(__file__).parents[2] / "src" / "quadapt" / "demo" / "model"
PROMPT, TOKENS = "Mia went to the", 12
NEEDS_XLLAMACPP = "needs xllamacpp (pip install 'quadapt[serve]')"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits, as `q4` and `nf4`, in a folder."""
    folder = tmp_path_factory.mktemp("served")
    for name, levels in (("q4", "int"), ("nf4", "nf")):
        quadapt("quantize", DEMO, "--rounding", "nearest", "--bits", 4, "--levels", levels, "-o", folder / name)
    return folder


@dataclass
class Served:
    """A server in a process of its own."""

    about: dict[str, Any]
    process: subprocess.Popen[str]

    def ask(self, route: str, question: dict[str, Any] | None = None, **headers: str) -> bytes:
        """What it answers to a GET, or to a POST if there is a question."""
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(
            self.about["address"] + route, data, {"Content-Type": "application/json", **headers}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
            return answer.read()

    def chat(self, prompt: str = PROMPT) -> str:
        """What it says to a message."""
        question = {"model": "q4", "messages": [{"role": "user", "content": prompt}]}
        answer = json.loads(self.ask("/v1/chat/completions", {**question, "max_tokens": TOKENS, "temperature": 0}))
        return answer["choices"][0]["message"]["content"]

    def complete(self, prompt: str = PROMPT) -> str:
        """How it goes on with a text."""
        question = {"model": "q4", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return json.loads(self.ask("/v1/completions", question))["choices"][0]["text"]

    def end(self, sign: signal.Signals) -> tuple[int, str]:
        """The exit code after a signal, and what was said on stderr."""
        self.process.send_signal(sign)
        _, said = self.process.communicate(timeout=600)
        return self.process.returncode, said


@contextmanager
def served(*arguments: object, temporary: Path) -> Iterator[Served]:
    """`quadapt serve` with arguments, on a free port, from when it answers."""
    command = [sys.executable, "-c", "from quadapt.cli import main; main()", "serve", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, process.communicate()
        yield Served(json.loads("".join(lines)), process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_llama_cpp_answers_as_chat_does(stories: Path, tmp_path: Path) -> None:
    """Messages reach the model as `quadapt chat` puts them, through llama.cpp's routes and from its page."""
    pytest.importorskip("xllamacpp", reason=NEEDS_XLLAMACPP)
    said = quadapt("chat", stories / "q4", "-p", PROMPT, "--max-new-tokens", TOKENS)["answer"]
    quadapt("export", stories / "q4", "-o", tmp_path / "q4.gguf")
    with LlamaCpp(tmp_path / "q4.gguf") as llama:
        assert len(llama.complete(llama.tokenize(PROMPT), TOKENS)) == TOKENS
    with served(stories / "q4", temporary=tmp_path) as server:
        assert server.about["engine"] == "llama.cpp"
        assert server.about["exact"].startswith("exactly: codes as they are")
        assert [each.name for each in tmp_path.glob("quadapt-serve-*/*")] == ["q4.gguf"]
        assert server.chat() == server.complete() == said
        assert json.loads(server.ask("/v1/models"))["data"][0]["id"] == server.about["name"] == "q4"
        page = gzip.decompress(server.ask("/", **{"Accept-Encoding": "gzip"})).decode()
        assert "<!doctype html>" in page.lower()
        port = server.about["address"].rpartition(":")[2]
        assert "is taken by another program" in give("serve", stories / "q4", "--port", port, code=2).error
        code, words = server.end(signal.SIGINT)
    assert (code, words.rstrip().rpartition("\n")[2]) == (130, "stopped")
    assert "Traceback" not in words
    assert not list(tmp_path.glob("quadapt-serve-*"))


@pytest.mark.slow
def test_a_file_is_served_as_it_is_until_it_is_terminated(stories: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason=NEEDS_XLLAMACPP)
    quadapt("export", stories / "q4", "-o", tmp_path / "q4.gguf")
    with LlamaCpp(tmp_path / "q4.gguf") as llama:
        known = llama.complete(llama.tokenize(PROMPT), TOKENS)
    with served(tmp_path / "q4.gguf", "--name", "mine", "--context", 64, temporary=tmp_path) as server:
        assert (server.about["exact"], server.about["name"]) == ("the file as it is", "mine")
        text = server.chat()
        assert json.loads(server.ask("/tokenize", {"content": PROMPT + text, "add_special": True}))["tokens"] == [
            *json.loads(server.ask("/tokenize", {"content": PROMPT, "add_special": True}))["tokens"],
            *known,
        ]
        assert json.loads(server.ask("/props"))["default_generation_settings"]["n_ctx"] >= 64
        code, words = server.end(signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4", "nf4"])
def test_transformers_answers_as_chat_does(name: str, stories: Path, tmp_path: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"needs {package} (pip install 'quadapt[serve]')")
    said = quadapt("chat", stories / name, "-p", PROMPT, "--max-new-tokens", TOKENS)["answer"]
    chosen = ("--engine", "transformers") if name == "q4" else ("--name", "q4")  # nf4 is chosen by itself
    with served(stories / name, *chosen, temporary=tmp_path) as server:
        assert server.about["engine"] == "transformers"
        assert server.chat() == server.complete() == said
        assert json.loads(server.ask("/v1/models"))["data"][0]["id"] == "q4"
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask("/v1/completions", {"model": "another", "prompt": "a"})
        assert b"requested 'another'" in refused.value.read()
        code, words = server.end(signal.SIGINT)
    assert (code, words.rstrip().rpartition("\n")[2]) == (130, "stopped")
    assert "Traceback" not in words


def chosen(model: object, tmp_path: Path, **settings: Any) -> Any:
    """The file that llama.cpp is to serve; None if it is transformers."""
    return serving._file(ServeConfig(model=str(model), **settings), tmp_path, UI(quiet=True))


def test_codes_that_gguf_does_not_hold_go_to_transformers(stories: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason=NEEDS_XLLAMACPP)
    assert chosen(DEMO, tmp_path) is None  # dense
    assert chosen(stories / "q4", tmp_path, engine="transformers") is None
    assert chosen(stories / "nf4", tmp_path) is None
    assert not list(tmp_path.iterdir())
    file = chosen(stories / "nf4", tmp_path, engine="llama-cpp")
    assert file.path.is_file()
    assert "dense F32" in file.exact


def test_an_adapter_that_cannot_merge_is_served_beside_its_base(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason=NEEDS_XLLAMACPP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "Where is Mia?", "completion": " in the barn"}\n' * 8)
    steps = ("--max-steps", 1, *SHORT)
    quadapt("tune", stories / "q4", "--method", "gptq-lora", "--data", "data.jsonl", "-o", "adapter", *steps)
    (tmp_path / "out").mkdir()
    file = chosen("adapter", tmp_path / "out")
    assert [each.name for each in (file.path, *file.besides)] == ["adapter.gguf", "adapter-lora.gguf"]
    assert "the adapter in a file beside it" in file.exact
    assert file.template == PromptForm("prompt").jinja()  # as it was trained
    again = chosen(file.path, tmp_path)
    assert (again.besides, again.exact) == (file.besides, "the file as it is with adapter-lora.gguf")


BAD = [
    (("q5",), "'q5' is neither a folder here nor a model on the hub"),
    (("q4.gguf",), "'q4.gguf' does not exist"),
    ((".",), "it is not a model folder"),
    (("q4", "--host", "no.such.host.invalid"), "host='no.such.host.invalid' is no address that is known here"),
    (("q4", "--host", "192.0.2.1"), "host='192.0.2.1' cannot be listened on"),
    (("q4", "--port", "70000"), "port=70000: must be a whole number, at least 0 and at most 65535"),
    (("q4", "--engine", "vllm"), "engine='vllm': input should be 'auto', 'llama-cpp' or 'transformers'"),
    (("q4", "--prompt-form", "chat", "--port", "0"), "the tokenizer has no chat template to ask through"),
    ((str(DEMO), "--engine", "llama-cpp", "--port", "0"), "is a dense model. Quantize or tune it first"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[" ".join(given)[-30:] for given, _ in BAD])
def test_what_cannot_be_served_is_refused(
    given: tuple[str, ...], words: str, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason=NEEDS_XLLAMACPP)
    monkeypatch.chdir(stories)
    assert words in give("serve", *given, code=2).error


def test_a_port_that_is_taken_and_a_missing_package_are_named(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        said = give("serve", stories / "q4", "--port", other.getsockname()[1], code=2)
    assert "is taken by another program. Use another --port, or --port 0 for a free one" in said.error
    monkeypatch.setitem(sys.modules, "fastapi", None)
    said = give("serve", stories / "q4", "--port", 0, "--engine", "transformers", code=2)
    assert said.error.endswith("fastapi is not installed. Run: pip install 'quadapt[serve]'")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    said = give("serve", stories / "q4", "--port", 0, code=2)
    assert said.error.endswith("xllamacpp is not installed. Run: pip install 'quadapt[serve]'")


def test_models_that_write_no_text_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=264, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "is a model for sequence-classification" in give("serve", tmp_path, "--port", 0, code=2).error


@pytest.mark.parametrize("kind", ["prompt", "alpaca"])
def test_a_form_as_a_chat_template_says_what_the_form_says(kind: Any) -> None:
    """Rendered by transformers itself, with what begins a text; quotes, braces and line ends are taken as they are."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, form = byte_tokenizer(), PromptForm(kind)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = ("<begin>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[begin])
    for prompt in ("Who?", 'a "b" {{ c }}\n', "  "):
        messages = [{"role": "user", "content": "earlier"}, {"role": "user", "content": prompt}]
        tokenizer.chat_template = form.jinja()
        assert tokenizer.apply_chat_template(messages, tokenize=False) == form.ask(prompt, tokenizer)
        tokenizer.chat_template = form.jinja(tokenizer)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == form.ids(form.ask(prompt, tokenizer), tokenizer)
        assert ids[0] == tokenizer.bos_token_id
    with pytest.raises(Exception, match="have no place for a system message"):
        tokenizer.apply_chat_template([{"role": "system", "content": "s"}, *messages], tokenize=False)


def test_a_chat_template_is_the_tokenizers_own() -> None:
    assert PromptForm("chat").jinja() is None
    with pytest.raises(DataError, match="has no chat template"):
        PromptForm("chat").check(byte_tokenizer())
