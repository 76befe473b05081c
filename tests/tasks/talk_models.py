"""Tiny models that see, each with its processor, and pictures of one colour to talk about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TURN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "SAID{% else %}{% for part in message.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{{ message.content }}<|im_end|>\n"
MARKED = (
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
)
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<image>", "<video>", "<start>", "<stop>", "<pad>")


def template(picture: str, *, marked: bool = False) -> str:
    """A chat template that writes `picture` for each picture; marked where the assistant speaks, if asked for."""
    return TURN.replace("SAID", MARKED if marked else PLAIN).replace("PICTURE", picture)


def tokenizer(**named: str) -> Any:
    """A token for each byte and for each mark of the template, of which some have the names that are given."""
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=named
    )


def ids(*tokens: str) -> list[int]:
    """The ids of some marks."""
    return [256 + SPECIALS.index(token) for token in tokens]


def llava() -> tuple[Any, Any]:
    """LLaVA, whose picture takes four tokens."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    sight = CLIPVisionConfig(**SIGHT, image_size=28, patch_size=14, projection_dim=32)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=sight, image_token_id=ids("<image>")[0], image_seq_length=4
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer(image_token="<image>"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=template("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3, which puts marks and empty lines around the four tokens of a picture."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    image, start, stop = ids("<image>", "<start>", "<stop>")
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=64, pad_token_id=ids("<pad>")[0]),
        vision_config=SiglipVisionConfig(**SIGHT, image_size=56, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=stop,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer(image_token="<image>", boi_token="<start>", eoi_token="<stop>"),
        chat_template=template("<start>"),
        image_seq_length=4,
    )
    return Gemma3ForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics 3, whose pictures are cut into as many tiles as their size asks for."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )
    from transformers.models.idefics3 import Idefics3VisionConfig

    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT, pad_token_id=ids("<pad>")[0]),
        vision_config=Idefics3VisionConfig(**SIGHT, image_size=28, patch_size=14),
        image_token_id=ids("<image>")[0],
        scale_factor=1,
        pad_token_id=ids("<pad>")[0],
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer(image_token="<image>", end_of_utterance_token="<|im_end|>"),
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


MODELS = {"llava": llava, "gemma3": gemma3, "idefics3": idefics3}


def write_pictures(folder: Path) -> None:
    """A picture of each colour, of two sizes, and `talks.jsonl` with questions about them."""
    from PIL import Image

    rows = []
    for at in range(12):
        name = list(COLOURS)[at % 3]
        Image.new("RGB", (28 + 28 * (at % 2), 28), COLOURS[name]).save(folder / f"{name}-{at}.png")
        asked = [{"type": "image", "image": f"{name}-{at}.png"}, {"type": "text", "text": "Which colour?"}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]})
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
