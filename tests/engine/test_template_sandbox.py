"""Chat templates in the sandbox: written as Transformers writes them, and stopped before they take the machine down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from safer_engine.errors import ModelRefused
from safer_engine.science.messages import Message
from safer_engine.science.rendering import make_renderer
from safer_engine.science.template_costs import Budget, TemplateOverrun
from safer_engine.science.template_sandbox import ChatTemplate
from tests.helpers.chat_templates import CHAT, EVIL, WRITTEN
from tests.helpers.tiny_model import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama")


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("template", WRITTEN)
def test_a_conversation_is_written_as_transformers_writes_it(tokenizer: Any, template: str, opened: bool) -> None:
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=opened, chat_template=template)
    assert ChatTemplate(template, tokenizer.special_tokens_map).render(CHAT, open_turn=opened) == expected


def test_a_long_conversation_fits_the_budget(tokenizer: Any) -> None:
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} " * 50} for i in range(2000)]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=WRITTEN[0])
    assert ChatTemplate(WRITTEN[0], tokenizer.special_tokens_map).render(chat) == expected
    long = [{"role": "user", "content": "x" * 6_000_000}]
    assert len(ChatTemplate(WRITTEN[0], {}).render(long)) > 6_000_000


def test_the_date_stands_still() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%A, %B %-d, %y %H:%M') }}", {})
    assert template.render(CHAT) == "26 Jul 2024|Friday, July 26, 24 00:00"


CHILD = """
import json, resource, sys
from safer_engine.errors import ModelRefused
from safer_engine.science.rendering import make_renderer
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (512 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (240, 240))
for name, template in json.loads(sys.stdin.read()).items():
    tokenizer.chat_template = template + "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        make_renderer(tokenizer, 512)
        said = "rendered"
    except ModelRefused as refused:
        said = refused.message
    print("answer", json.dumps([name, said]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What becomes of each evil template in a process that may take half a gigabyte more, and four minutes in all."""
    folder = tmp_path_factory.mktemp("evil")
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-c", CHILD, str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=json.dumps(EVIL), capture_output=True, text=True, timeout=600, check=True, cwd=root)
    lines = [json.loads(line.removeprefix("answer ")) for line in done.stdout.splitlines() if line.startswith("answer ")]
    return dict(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.parametrize("name", EVIL)
def test_evil_templates_are_refused_before_they_take_memory_or_time(answers: dict[str, str], name: str) -> None:
    assert "chat template" in answers[name]
    assert "MemoryError" not in answers[name], "it must not get that far"
    assert len(answers[name]) < 500


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% block a %}{% endblock %}", "block is not for chat templates"),
        ("{% include 'x' %}", "include is not for chat templates"),
        ("{% extends 'x' %}", "extends is not for chat templates"),
        ("{% autoescape true %}{% endautoescape %}", "not for chat templates"),
        ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "recursive loop"),
        ("{{ lipsum() }}", "undefined"),
        ("{{ 'x' | urlize }}", "urlize"),
        ("{{ (5).to_bytes(10**10, 'big') }}", "can't call int.to_bytes"),
        ("{{ 'x'.translate({}) }}", "can't call str.translate"),
        ("{{ 'x'.encode() }}", "can't call str.encode"),
        ("{{ ''.__class__.mro }}", "unsafe"),
        ("{{ '{0.__class__.mro}'.format('x') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(a=1) %}{% set ns._x = 1 %}", "_x"),
        ("{{ {(1, 2): 3} }}", "can't be looked up"),
        ("{{ {}[(1, 2)] }}", "can't be looked up"),
        ("{{ messages[0]() }}", "can't call dict"),
        ("{{ x() }}", "undefined"),
        ("{{ ['a'] | sum(start='') }}", "numbers only"),
    ],
)
def test_what_no_chat_template_needs_is_refused_by_name(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelRefused, match=words) as caught:
        make_renderer(tokenizer, 512)
    assert "chat_template" in caught.value.hint


@pytest.mark.parametrize(
    "evil",
    [
        "{{ 'a' * 10**10 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ m.content * 1000000 }}",
    ],
)
def test_a_template_that_turns_evil_on_a_row_is_refused_then(tokenizer: Any, evil: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'now' in m.content %}" + evil + "{% endif %}{{ m.content }}{% endfor %}"
    )
    renderer = make_renderer(tokenizer, 512)
    request = ((Message("user", "Hi?"),), "Fine.")
    assert renderer.side(*request).text == "Hi?Fine."
    with pytest.raises(ModelRefused, match="chat template"):
        renderer.sides([request, ((Message("user", "Hi, now?"),), "Fine.")])


def test_what_is_written_is_bounded_too() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content * 40 }}{% endfor %}", {})
    with pytest.raises(TemplateOverrun, match="writes 8,000,000 characters for a conversation of 200,00"):
        template.render([{"role": "user", "content": "x" * 200_000}])
    assert len(template.render([{"role": "user", "content": "x" * 1000}])) == 40_000


def test_the_same_template_stops_at_the_same_step() -> None:
    template = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ raise_exception(i) if false }}{% endfor %}{% endfor %}", {}
    )
    left = []
    for _ in range(2):
        with pytest.raises(TemplateOverrun, match="does not end within"):
            template.render(CHAT)
        left.append(template._environment.budget.left)
    assert left[0] == left[1] < 0
    with pytest.raises(TemplateError):
        ChatTemplate("{{ raise_exception('no') }}", {}).render(CHAT)


@pytest.mark.parametrize(
    ("value", "price"),
    [
        ("abc", 4), (7, 1), (2.5, 1), (None, 1), (True, 1), (1 << 640, 11), (["ab", "c"], 4 * 3 + 3 + 2), ((), 4),
        ({"a": [1]}, 8 * 2 + 2 + (4 * 2 + 1)), ([["a"] * 2] * 3, 4 * 4 + 3 * (4 * 3 + 4)), (range(10), 40),
    ],
)  # fmt: skip
def test_values_are_paid_for_as_if_written_out(value: Any, price: int) -> None:
    budget = Budget()
    budget.left = 1000
    assert budget.weighed(value) is value
    assert budget.left == 1000 - price
    budget.left = price - 1
    with pytest.raises(TemplateOverrun):
        budget.weighed(value)
