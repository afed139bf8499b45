from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from llmprune.disclosure import hide_secrets, local_name, refuse_secrets, without_paths
from llmprune.errors import InputError

TOKEN = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("source: /home/ann/models/x.gguf\n", "source: local:x.gguf\n"),
        ('"/Users/ann/m"', '"local:m"'),
        ("/home/ann", "local:home"),
        ("in /home/ann/, and", "in local:home, and"),
        ("/root/runs/a", "local:a"),
        (r"C:\Users\ann\m", "local:m"),
        (r'"C:\\Users\\ann\\m.txt"', '"local:m.txt"'),
        ("C:/Users/ann/m", "local:m"),
        ("/tmp/x/y.txt", "local:y.txt"),
    ],
)
def test_a_path_of_a_machine_leaves_only_its_last_name(text: str, public: str) -> None:
    assert without_paths(text) == public


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/ann/x",
        "owner/name",
        "and/or/else",
        "/usr/bin/env python",
        "1/2/3 tokens/s",
        "local:x.gguf",
        "~/models/x",
    ],
)
def test_what_is_no_path_of_a_machine_stays(text: str) -> None:
    assert without_paths(text) == text


def test_a_path_that_is_here_goes_wherever_it_is(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent / "absent.txt"
    assert without_paths(f"from {here}.") in ("from local:absent.txt.", "from local:absent.txt")
    assert without_paths(f"{tempfile.gettempdir()}/run/x") in ("local:x",)
    assert str(tmp_path) not in without_paths(f'{{"a": "{tmp_path}/b"}}')


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "ghp_" + "a1" * 18,
        "AKIA" + "A1" * 8,
        "-----BEGIN RSA PRIVATE KEY-----",
        "sk-" + "a" * 40,
    ],
)
def test_a_text_with_a_token_is_refused_and_the_message_keeps_it(secret: str) -> None:
    with pytest.raises(InputError, match=r"a\.json: must hold no access token, line 2") as refusal:
        refuse_secrets(f'{{\n"x": "{secret}"}}', "a.json")
    assert secret not in str(refusal.value)
    assert secret not in hide_secrets(f"the server said {secret}!")


def test_the_users_own_token_is_found_in_any_form() -> None:
    with pytest.raises(InputError, match="access token"):
        refuse_secrets("x my-own-secret x", "a.json", "my-own-secret")
    assert "my-own-secret" not in hide_secrets("no my-own-secret", "my-own-secret")


@pytest.mark.parametrize("text", ["hf_hub_download", "hf_", "the hf_tokenizer", "risk-averse"])
def test_words_are_no_tokens(text: str) -> None:
    refuse_secrets(text, "a.json", None)


def test_a_home_folder_does_not_tell_its_users_name() -> None:
    assert local_name("/data/x/") == "local:x"
    assert local_name("") == "local:home"
