"""`quadapt chat`: type, and read what the model says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quadapt.config import ChatConfig
from quadapt.data import PromptForm, pad_token_id
from quadapt.errors import DataError
from quadapt.hf.context import context_of
from quadapt.hf.folder import open_folder
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.reading import generating
from quadapt.hf.vocabulary import embedding_rows
from quadapt.jobs.source import check_writes, load_as_asked
from quadapt.report.ui import UI


def chat(config: ChatConfig, ui: UI) -> dict[str, Any]:
    """Run the command: answer one prompt, or keep asking until the input ends."""
    model, tokenizer = load_as_asked(config)
    check_writes(kind_of_model(model), config.model, "chat")
    form = form_of_folder(config, tokenizer)
    torch.manual_seed(config.seed)
    history: list[dict[str, str]] = []
    if config.prompt is not None:
        said = answer(model, tokenizer, config, config.prompt, history, form)
        ui.show(said)
        return {"prompt": config.prompt, "answer": said}
    ui.say(
        "an empty line or Ctrl-D ends"
        + {
            "chat": "",
            "alpaca": "; each line is put into Alpaca's template, as in training, and stands alone",
        }.get(form.kind, "; the model continues your text")
    )
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            break
        if not prompt:
            break
        ui.show(answer(model, tokenizer, config, prompt, history, form))
    return {"turns": history}


def form_of_folder(config: ChatConfig, tokenizer: Any) -> PromptForm:
    """The form to ask in: what is given, else that of training, else what the tokenizer suggests."""
    if config.prompt_form != "auto":
        return PromptForm(config.prompt_form)
    note = {} if config.model.endswith(".gguf") else open_folder(config.model).note
    return PromptForm.recorded(note, tokenizer)


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    config: ChatConfig,
    prompt: str,
    history: list[dict[str, str]],
    form: PromptForm,
) -> str:
    """What the model says to a prompt in the form of training; through a chat template it knows the turns before.

    Raises:
        DataError: There is nothing to answer, or the conversation no longer fits the model's context.
    """
    whole = form.ask(prompt, tokenizer, system=config.system, history=history)
    ids = torch.tensor([form.ids(whole, tokenizer)], dtype=torch.long)
    if not ids.shape[1]:
        raise DataError("the prompt is empty. Give the model something to go on from")
    room = context_of(model.config) - ids.shape[1]
    if room < 1:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens, the model's context {context_of(model.config)}. Shorten it"
        )
    sampled = {"do_sample": True, "temperature": config.temperature} if config.temperature else {"do_sample": False}
    device = next(model.parameters()).device
    output = generating(
        model,
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids).to(device),
        max_new_tokens=min(config.max_new_tokens, room),
        pad_token_id=pad_token_id(tokenizer, embedding_rows(model)),
        **sampled,
    )
    said = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    return said
