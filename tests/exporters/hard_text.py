"""A text that tokenizers stumble over, and strings drawn from its pieces: emoji, code, runs of spaces, four scripts."""

from __future__ import annotations

import random

SCRIPTS = """The fox's tail isn't blue; they'll say I'VE 1234567 reasons (see p. 42-47), e.g. $3.50 or 100%.
Das Größte, là-bas: señor Ångström naïvely paid 1.999,95€ für „Brot“ — c'est l'été!
Съешь ещё этих мягких французских булок, да выпей чаю. Объём: 25 км² в 2024-м году.
我能吞下玻璃而不伤身体。価格は1,200円です。カタカナとひらがな、漢字。한국어도 조금 있습니다.
"""
"""Latin, Cyrillic, Han with kana, and Hangul: letters alone, none of them a combining mark."""

CODE = """def f(x: int = 0) -> dict[str, list]:
    return {"a": [x**2 for x in range(10)], 'b_c': x != 3 and not (x >= 7)}  # 100_000

\tif (a&&b||!c) { printf("%d\\n", a[i]->next); }\r\n<div class="x-y">&amp;</div> https://a.b/c?d=e&f=g#h
"""

SIGNS = "🦊 👩\u200d🚀🎉 ½ x² Ⅷ ٣ ¿qué? …— «ok» №5 ™ © ≤ ∑ → ✓ \u00a0nbsp \u200bzero\n"

HARD = SCRIPTS + CODE + SIGNS
"""All of it."""

MARKS = "हिन्दी में नमस्ते। ภาษาไทย เก่ง e\u0301te\u0301 CamelÜber straßeÄrger ÉTÉs ИмяФамилия iPhoneX \n"
"""Combining marks, and capitals after small letters that are not those of English."""

_SPACES = ["  ", "   ", "     ", "\n\n", " \n", "\n   ", "\t\t", " \t ", "\r\n\r\n", "        "]


def mixed(count: int, *, marks: bool = False, seed: int = 0) -> list[str]:
    """Strings of pieces of the text in any order, with runs of spaces, and the whole text first."""
    choose, text = random.Random(seed), HARD + (MARKS if marks else "")
    drawn = [text, SCRIPTS, CODE, SIGNS, *text.split("\n")]
    for _ in range(count):
        parts = []
        for _ in range(choose.randint(1, 8)):
            start = choose.randrange(len(text))
            parts.append(text[start : start + choose.randint(1, 9)])
            parts.append(choose.choice(["", "", " ", *_SPACES]))
        drawn.append("".join(parts))
    return [each for each in drawn if each]
