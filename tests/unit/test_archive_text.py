"""What of a chat is made searchable: the last thing asked, and its answer."""

from typing import Any

import pytest

from workers.vectors import searchable_text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are terse."}
CALL = {"id": "c1", "function": {"name": "get_weather", "arguments": "{}"}}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("Who?"), assistant("Me.")], "Who?\nMe."),
        # Only the last question counts, and no instructions
        ([SYSTEM, user("Who?"), assistant("Me."), user("Where?"), assistant("Here.")], "Where?\nHere."),
        # A question that follows a question
        ([user("Hello"), user("Who?"), assistant("Me.")], "Who?\nMe."),
        # What it thought is not what it said
        ([user("Who?"), assistant("Me.", reasoning="The user asks who.")], "Who?\nMe."),
        # Tool calls stand between question and answer
        ([user("Sun?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Yes.")], "Sun?\nYes."),
        ([user("Sun?"), assistant(None, tool_calls=[CALL])], "Sun?"),
        ([user("Sun?"), assistant("", tool_calls=[CALL]), RESULT], "Sun?"),
        # Text parts, with what else may stand among them
        (
            [user([{"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}]), assistant("Tea.")],
            "What\nis it?\nTea.",
        ),
        ([user("Who?"), assistant([{"type": "text", "text": "Me."}])], "Who?\nMe."),
        ([user([{"type": "text", "text": "Who?"}, "stray"]), assistant("Me.")], "Who?\nMe."),
        # Nobody asked, or nobody answered
        ([SYSTEM, assistant("Hello.")], "Hello."),
        ([user("Who?")], "Who?"),
        ([user("Who?"), assistant("")], "Who?"),
        ([user(""), assistant("Me.")], "Me."),
        # Lines and other alphabets stay as they are
        ([user("Zwei\nZeilen?"), assistant("はい 🦀")], "Zwei\nZeilen?\nはい 🦀"),
    ],
)
def test_it_is_the_last_question_and_its_answer(messages: list[dict[str, Any]], text: str) -> None:
    assert searchable_text(messages) == text


@pytest.mark.parametrize(
    "messages",
    [
        *([], [SYSTEM], [user(""), assistant("")], [user(None), assistant(None)], [user([]), assistant([])], [{}]),
        # Nor what no process of ours says
        [user(5), assistant({"text": 5})],
        [user([5, {"text": 5}, {"text": None}]), assistant([[]])],
    ],
)
def test_a_chat_without_text_still_has_some(messages: list[dict[str, Any]]) -> None:
    # An empty text is no input of an embedding model; a blank one is
    assert searchable_text(messages) == " "
