"""Formats of real models, as detected from mlx-lm's tokenizer: tokenizers with their markers and short templates in their style.

They show that a prompt describes the tools, that earlier calls are rendered in a form that the template supports, and that mlx-lm's
parser parses an answer in the model's native format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.protocol import ChatPrompt, GenerationJob, Reasoning, ToolArguments, ToolCall, ToolUse
from worker.text import answer_format, answer_parser, prompts
from worker.text.answer_format import CallFormat, ModelFormat
from worker.text.answer_parser import AnswerParser
from worker.text.detokenizer import TokenBytes
from worker.text.templates.support import ToolMessageStyle

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says how the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
HELLO = {"role": "user", "content": "Hello."}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Bern"}},
}
HISTORY = [
    HELLO,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "get_weather"},
]

CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}
{{ m.content }}{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

ALWAYS_THINKS = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)

MISTRAL = """<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'system' %}{{ raise_exception('no system role') }}
{%- elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content }}, "id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{% if c.id | length != 9 -%}
{{ raise_exception('ids have length 9') }}{% endif %}{{ c.function | tojson }}{{ c.id }}{% endfor %}</s>
{%- else %}{{ m.content }}</s>{% endif %}{% endfor %}"""

DEEPSEEK = """{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls -%}
{{ '<|call|>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{% else %}<|{{ m.role }}|>{{ m.content }}
{%- endif %}{% endfor %}<|assistant|>"""

GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}
{%- endif %}<start_of_turn>{{ m.role }}
{{ m.content }}<end_of_turn>
{% endfor %}"""

PYTHONIC = CHATML.replace(
    "{%- for m",
    "{% if tools %}<|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}{%- for m",
    1,
)

MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<s>", "</s>"),
]


class Model:
    """A tokenizer and its detected format."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.format: ModelFormat = answer_format.detect_format(tokenizer)
        self.token_bytes = TokenBytes(tokenizer)

    def prompt(self, job: GenerationJob) -> str:
        return str(self.tokenizer.decode(self.ids(job)))

    def ids(self, job: GenerationJob) -> list[int]:
        return prompts.tokenize(job, self.tokenizer, 10_000, self.format)

    def parser(self, job: GenerationJob) -> AnswerParser:
        parser = answer_parser.make_parser(job, self.format, self.ids(job), self.token_bytes)
        assert parser is not None
        return parser

    def read(self, job: GenerationJob, text: str) -> list[Any]:
        """Parse an answer token by token, as the engine does; adjacent parts of the same kind are joined."""
        parser, detokenizer = self.parser(job), self.token_bytes.new_detokenizer(after_template=True)
        parts: list[Any] = []
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            parts += parser.feed(detokenizer.add(token_id))
        parts += parser.feed(detokenizer.flush()) + parser.flush(is_cut=False)
        whole: list[Any] = []
        for part in parts:
            if whole and isinstance(part, str) and isinstance(whole[-1], str):
                whole[-1] += part
            elif whole and isinstance(part, Reasoning) and isinstance(whole[-1], Reasoning):
                whole[-1] = Reasoning(whole[-1].text + part.text)
            elif whole and isinstance(part, ToolArguments) and isinstance(whole[-1], ToolArguments):
                whole[-1] = ToolArguments(part.index, whole[-1].text + part.text)
            else:
                whole.append(part)
        return whole


Make = Callable[..., Model]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that saves a byte-level tokenizer with markers and a template, and loads it with mlx-lm."""
    from mlx_lm import tokenizer_utils
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(template: str | None, markers: list[str] = MARKERS, parser: str | None = None) -> Model:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=markers[-1])
        fast.chat_template = template
        fast.save_pretrained(folder)
        if parser is not None:
            config = folder / "tokenizer_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"tool_parser_type": parser}))
        return Model(tokenizer_utils.load(folder))

    return made


def job(messages: list[dict[str, Any]] | None = None, arguments: Any = None, **use: Any) -> GenerationJob:
    return GenerationJob(
        job_id="a",
        model="m",
        channel="c",
        prompt=ChatPrompt(messages or [HELLO], template_arguments=arguments or {}),
        tool_use=ToolUse(tools=[TOOL], **use) if use.pop("tools", True) else None,
    )


def weather(index: int = 0, arguments: str = '{"city": "Bern"}') -> list[Any]:
    return [ToolCall(index, "get_weather"), ToolArguments(index, arguments)]


def test_qwen(make: Make) -> None:
    """Its native format is the Hermes format; reasoning begins with a marker, and can be switched off."""
    model = make(QWEN)
    assert model.format.template.uses_hermes_calls
    assert answer_format.choose_call_format(job(), model.format) is CallFormat.NATIVE
    assert "Says how the weather is." in model.prompt(job())
    assert "<|im_start|>system" not in model.prompt(job(tools=False))
    text = '<think>\nWeather, so.\n</think>\n\nLet me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🌧"}}\n</tool_call>'
    assert model.read(job(), text) == [
        Reasoning("Weather, so."),
        "Let me see.\n",
        *weather(),
        *weather(1, '{"city": "Zürich 🌧"}'),
    ]
    assert model.read(job(is_required=True), text)[2:4] == weather()
    # If a call is required, the template still describes the tools: its own format is the Hermes format.
    assert model.prompt(job(is_required=True)) == model.prompt(job())
    assert model.prompt(job(arguments={"enable_thinking": False})).endswith("<think>\n\n</think>\n\n")
    assert not model.parser(job(arguments={"enable_thinking": False})).is_reasoning


def test_qwen_tool_messages(make: Make) -> None:
    """Calls and results are rendered by the template, which supports them."""
    model = make(QWEN)
    assert model.format.template.tool_message_style is ToolMessageStyle.OBJECTS
    text = model.prompt(job(HISTORY))
    assert '{"name": "get_weather", "arguments": {"city": "Bern"}}' in text
    assert "<tool_response>sunny</tool_response>" in text
    assert model.prompt(job(HISTORY, tools=False)).count("get_weather") == 1


def test_a_model_that_always_reasons(make: Make) -> None:
    """The template opens reasoning, so the answer begins with it; a marker in a user's message does not open reasoning."""
    model = make(ALWAYS_THINKS)
    assert model.read(job(tools=False), "Hm.\n</think>\n\nYes.") == [Reasoning("Hm."), "Yes."]
    plain = make(CHATML)
    asked = job([{"role": "user", "content": "What is <think>"}], tools=False)
    assert plain.read(asked, "A marker.") == ["A marker."]


def test_mistral(make: Make) -> None:
    """No end marker, ids of nine characters, no system role."""
    model = make(MISTRAL)
    assert model.format.template.tool_message_style is ToolMessageStyle.SHORT_IDS
    assert answer_format.choose_call_format(job(), model.format) is CallFormat.NATIVE
    assert "[AVAILABLE_TOOLS]" in model.prompt(job())
    assert (
        model.read(job(), '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bern"}}]') == weather()
    )
    assert model.read(
        job(), 'Well. [TOOL_CALLS]get_weather[ARGS]{"city": "Bern"}[TOOL_CALLS]get_weather[ARGS]{"days": 2}'
    ) == ["Well. ", *weather(), *weather(1, '{"days": 2}')]
    assert model.read(job(), "[TOOL_CALLS]nonsense") == ["[TOOL_CALLS]nonsense"]
    text = model.prompt(job(HISTORY))
    assert '[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "Bern"}}' in text
    assert "sunny" in text


def test_mistral_with_a_required_call(make: Make) -> None:
    """The grammar enforces the Hermes format: the prompt describes that format only, history included."""
    model = make(MISTRAL)
    text = model.prompt(job(HISTORY, is_required=True))
    assert "[AVAILABLE_TOOLS]" not in text
    assert "[TOOL_CALLS]" not in text
    assert "<tool_call>" in text
    assert text.startswith("<s>[INST]You can call functions.")
    answer = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
    assert model.read(job(is_required=True), answer) == weather()


def test_pythonic(make: Make) -> None:
    """Calls are Python expressions (LFM 2), several between one pair of markers."""
    model = make(PYTHONIC)
    assert answer_format.choose_call_format(job(), model.format) is CallFormat.NATIVE
    text = '<|tool_call_start|>[get_weather(city="Bern"), get_weather(city="Thun", days=2)]<|tool_call_end|>Wait.'
    assert model.read(job(), text) == [*weather(), *weather(1, '{"city": "Thun", "days": 2}'), "Wait."]
    assert model.read(job(is_parallel=False), text) == weather()
    assert model.read(job(tools=False), text) == [text]


def test_a_template_without_tools(make: Make) -> None:
    """Our instructions describe the tools, in the conversation's system message; calls and results become text."""
    model = make(CHATML, ["<|im_start|>", "<|im_end|>"])
    assert answer_format.choose_call_format(job(), model.format) is CallFormat.HERMES
    assert model.format.template.tool_message_style is None
    text = model.prompt(
        job([{"role": "system", "content": "Be kind."}, *HISTORY, {"role": "user", "content": "Thanks."}])
    )
    system, _, rest = text.partition("<|im_end|>")
    assert system.startswith("<|im_start|>system\nBe kind.\n\nYou can call functions.")
    assert json.dumps(TOOL["function"]) in system
    assert rest == (
        "\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\nThanks.<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
    assert model.read(job(), answer) == weather()
    assert model.read(job(), "It is sunny.") == ["It is sunny."]


def test_instructions(make: Make) -> None:
    """They ask for one call or several, of any function or a named one, as the request does."""
    model = make(CHATML, ["<|im_start|>", "<|im_end|>"])
    texts = [
        model.prompt(job(**use))
        for use in ({}, {"is_required": True}, {"function": "get_weather"}, {"is_parallel": False})
    ]
    assert len(set(texts)) == 4
    assert "the function get_weather now" in texts[2]


def test_deepseek(make: Make) -> None:
    """Its template appends arguments to a string, so they are JSON text."""
    model = make(DEEPSEEK)
    assert model.format.template.tool_message_style is ToolMessageStyle.STRINGS
    assert '<|call|>get_weather {"city": "Bern"}' in model.prompt(job(HISTORY, tools=False))
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Be'}}
    cut = [
        HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "?"},
    ]
    assert '<|call|>get_weather {"city": "Be' in model.prompt(job(cut, tools=False))


def test_gemma(make: Make) -> None:
    """No system role, alternating roles, no tools: instructions, calls and results become user messages."""
    model = make(GEMMA)
    text = model.prompt(job([*HISTORY, {"role": "user", "content": "Thanks."}]))
    assert text.startswith("<start_of_turn>user\nYou can call functions.")
    assert text.count("<start_of_turn>user") == 2
    assert model.prompt(job([HELLO, HELLO], tools=False)) == (
        "<start_of_turn>user\nHello.\n\nHello.<end_of_turn>\n"
    )


def test_a_model_without_a_template(make: Make) -> None:
    """Tools and history are part of the text that the role mapping produces."""
    model = make(None)
    text = model.prompt(job(HISTORY))
    assert text.startswith("ASSISTANT's RULE: You can call functions.")
    assert "USER: <tool_response>\nsunny\n</tool_response>\nASSISTANT:" in text


ARG_KEYS = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("glm47", ARG_KEYS),
        ("laguna", ARG_KEYS),
        ("longcat", ARG_KEYS.replace("tool_call", "longcat_tool_call").replace("arg_", "longcat_arg_")),
        ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Bern<|"|>,days:2}<tool_call|>'),
        (
            "function_gemma",
            "<start_function_call>call:get_weather{city:<escape>Bern<escape>,days:2}<end_function_call>",
        ),
        (
            "qwen3_coder",
            (
                "<tool_call>\n<function=get_weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n2\n"
                "</parameter>\n</function>\n</tool_call>"
            ),
        ),
        (
            "kimi_k2",
            (
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
                '{"city": "Bern", "days": 2}<|tool_call_end|><|tool_calls_section_end|>'
            ),
        ),
        (
            "kimi_k3",
            (
                '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>json type="object"<|sep|>'
                '{"city": "Bern", "days": 2}<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>'
            ),
        ),
        (
            "minicpm5",
            '<function name="get_weather"><param name="city">Bern</param><param name="days">2</param></function>',
        ),
        (
            "minimax_m2",
            (
                '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Bern</parameter>\n'
                '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>'
            ),
        ),
        (
            "muse_spark",
            (
                '<atem:function_calls><atem:invoke name="get_weather"><atem:parameter name="city">Bern</atem:parameter>'
                '<atem:parameter name="days">2</atem:parameter></atem:invoke></atem:function_calls>'
            ),
        ),
    ],
)
def test_every_format_of_mlx_lm(make: Make, parser: str, text: str) -> None:
    """A call in each native format, after and before text, next to one that the parser cannot parse."""
    model = make("{{ tools | tojson }}" + CHATML, parser=parser)
    assert answer_format.choose_call_format(job(), model.format) is CallFormat.NATIVE
    # Its parser may take JSON as well, but its template does not ask for it.
    assert not model.format.template.uses_hermes_calls
    both = '{"city": "Bern", "days": 2}'
    assert model.read(job(), f"Look. {text} Wait.") == ["Look. ", *weather(0, both), "Wait."]
    unknown = text.replace("get_weather", "get_lost")
    assert model.read(job(), unknown) == [unknown]
