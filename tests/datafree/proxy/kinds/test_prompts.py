from __future__ import annotations

import torch

from datafree.proxy.kinds.prompts import PAIRED, SUBJECTS, TEMPLATES, compose


def prompts(classes: list[list[str]], count: int = 400) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [compose(classes, generator) for _ in range(count)]


def test_seven_prompts_in_ten_mix_the_parents_classes() -> None:
    made = prompts([["cat", "dog"], ["truck", "ship"]])
    mixed = [
        text
        for text in made
        if any(a in text for a in ("cat", "dog")) and any(b in text for b in ("truck", "ship"))
    ]
    assert 0.6 < len(mixed) / len(made) < 0.8
    assert all(any(name in text for name in ("cat", "dog", "truck", "ship")) for text in made)


def test_without_names_the_subjects_are_neutral() -> None:
    made = prompts([[], []])
    assert len(set(made)) > 350
    assert all(any(subject in text for subject in SUBJECTS) for text in made)


def test_the_names_of_one_parent_are_enough() -> None:
    assert all("cat" in text for text in prompts([["cat"], []], 50))


def test_equal_names_are_not_paired_with_themselves() -> None:
    assert all(text.count("cat") == 1 for text in prompts([["cat"], ["cat"]], 50))


def test_lists_hold_no_slips() -> None:
    assert len(set(SUBJECTS)) == len(SUBJECTS) > 150
    assert all(subject == subject.strip() and subject for subject in SUBJECTS)
    assert all(text.count("{}") == 1 for text in TEMPLATES)
    assert all(text.count("{}") == 2 for text in PAIRED)
