"""Chat templates in their own processes: the text of `apply_chat_template`, and an error for all else they may do."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flextron.generation.templates import ChatTemplate, TemplateError, _processes
from tests.jobs.making import tokenizer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be <b>kind</b> & 'brief', é 中 🙂"},
        {"role": "user", "content": "  two\nlines\n", "name": "Ann"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"},
        {"role": "user", "content": "{{ 1 + 1 }}{% raise %}"},
    ],
]
CHATML = (
    "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "\n{%- endif %}\n{%- set ns = namespace(last=messages | length - 1) %}"
    "{% for m in messages[::-1] %}{% if m.role == 'user' and not ns.found is defined %}"
    "{% set ns.last = messages | length - loop.index %}{% set ns.found = true %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% if loop.index0 == ns.last %}!{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}|{{ x }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}{% if strftime_now is defined %}yes{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{#- note -#}\n b {{- ' c' }}\n",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ enable_thinking is defined }}",
    "values": "{{ dict(a=1).a }}{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}",
    "macro": "{% macro say(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
}


@pytest.fixture
def tok() -> PreTrainedTokenizerBase:
    return tokenizer()


def of(tok: PreTrainedTokenizerBase, template: Any, **limits: Any) -> ChatTemplate:
    tok.chat_template = template
    found = ChatTemplate.of(tok, **limits)
    assert found is not None
    return found


def refused(template: ChatTemplate) -> str:
    with pytest.raises(TemplateError) as error:
        template.render(CONVERSATIONS[0], add_generation_prompt=True)
    return str(error.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(tok: PreTrainedTokenizerBase, name: str) -> None:
    template = of(tok, TEMPLATES[name])
    for messages in CONVERSATIONS:
        for begins in (False, True):
            wanted = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins)
            assert template.render(messages, add_generation_prompt=begins) == wanted
            assert wanted


def test_several_templates(tok: PreTrainedTokenizerBase) -> None:
    template = of(tok, {"default": CHATML, "tool_use": "no"})
    wanted = tok.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert template.render(CONVERSATIONS[0], add_generation_prompt=False) == wanted
    tok.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(TemplateError, match="multiple chat templates with no default"):
        ChatTemplate.of(tok)
    tok.chat_template = None
    assert ChatTemplate.of(tok) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ '{0}'.format() }}", "IndexError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ '%(a)s' % {} }}", "KeyError: 'a'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% if %}", "Expected an expression"),
        ("{{ ().__class__.__base__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{{ raise_exception('x' * 10**6) }}", "xxx"),
    ],
)
def test_what_templates_raise(tok: PreTrainedTokenizerBase, template: str, said: str) -> None:
    found = refused(of(tok, template))
    assert said in found
    assert len(found) <= 500


@pytest.mark.parametrize("template", [LOOP, "{% set x = 10 ** (10 ** 9) %}", "{{ ('a' * 40) | wordwrap(1) }}" + LOOP])
def test_what_does_not_end(tok: PreTrainedTokenizerBase, template: str) -> None:
    looping, begun = of(tok, template, seconds=0.5), time.monotonic()
    fine = of(tok, CHATML)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(refused, looping) for _ in range(5)]
        assert pool.submit(fine.render, CONVERSATIONS[0], add_generation_prompt=True).result(5)
        assert {future.result(20) for future in waiting} == {"it did not end within 0.5 s"}
    assert time.monotonic() - begun < 15


def test_what_writes_without_end(tok: PreTrainedTokenizerBase) -> None:
    assert "1001 characters, more than 1000" in refused(of(tok, "{{ 'a' * 1001 }}", max_chars=1000))
    endless = "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"
    assert "MemoryError" in refused(of(tok, endless, seconds=60))


def test_processes_that_end_are_started_again(tok: PreTrainedTokenizerBase) -> None:
    template = of(tok, CHATML)
    wanted = template.render(CONVERSATIONS[0], add_generation_prompt=True)
    program = _processes()._program
    assert program is not None
    program.kill()
    assert template.render(CONVERSATIONS[0], add_generation_prompt=True) == wanted
    _processes()._end()
    assert template.render(CONVERSATIONS[0], add_generation_prompt=True) == wanted


def test_ctrl_c_is_not_for_them(tok: PreTrainedTokenizerBase) -> None:
    ChatTemplate.warm_up()
    program = _processes()._program
    assert program is not None
    os.kill(program.pid, signal.SIGINT)
    assert of(tok, CHATML).render(CONVERSATIONS[0], add_generation_prompt=True)
    assert program.poll() is None
    assert os.getpgid(program.pid) != os.getpgid(0)
