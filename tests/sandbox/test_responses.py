"""What is read of a response, by training's rule and of other people's completions."""

import time

import pytest

from hacks import CANONICAL, FORGERIES, HACKS, WRONG, fenced, make_task
from projected_grpo.rewards import Grader
from projected_grpo.sandbox.host import Limits, Sandbox
from projected_grpo.sandbox.responses import completion_text, extract_code, readings, unread

RIGHT = CANONICAL.strip()
IN_A_LIST = "\n".join(f"   {line}" for line in RIGHT.splitlines())
QUOTING = RIGHT.replace(
    "return", "'''\n        ```\n        total([1])\n        ```\n        '''\n        return"
)
STARTS = RIGHT.replace("return sum(nums)", 'return sum(nums) if "```" else 0')

# How people's completions hold code; in each, RIGHT (or what stands beside the shape) is what counts.
SHAPES = {
    "as asked": f"```python\n{RIGHT}\n```",
    "end of turn": f"```python\n{RIGHT}\n```<|im_end|>",
    "ends of turn": f"```python\n{RIGHT}\n```\n<|im_end|>\n<|endoftext|><|endoftext|>",
    "end of turn, cut off": f"```python\n{RIGHT}</s>",
    "end of turn, then more": f"```python\n{RIGHT}\n```<｜end▁of▁sentence｜>\n<|user|>\nThanks!",
    "closed on the last line": f"```python\n{RIGHT}```",
    "closed on the last line, words": f"```python\n{RIGHT}```\nDone.",
    "words behind the closing fence": f"```python\n{RIGHT}\n``` which is linear.",
    "in a list": f"1. Here:\n\n   ```python\n{IN_A_LIST}\n   ```\n",
    "behind a list's number": f"1. ```python\n{IN_A_LIST}\n   ```\n",
    "in a list, by a tab": "\t```python\n"
    + "\n".join(f"\t{line}" for line in RIGHT.splitlines())
    + "\n\t```",
    "only the fence in a list": f"   ```python\n{RIGHT}\n   ```",
    "four backticks": f"````python\n{RIGHT}\n````",
    "tildes": f"~~~python\n{RIGHT}\n~~~",
    "no language": f"```\n{RIGHT}\n```",
    "no language, tildes": f"Answer:\n~~~\n{RIGHT}\n~~~\nDone.",
    "py": f"```py\n{RIGHT}\n```",
    "Python 3": f"``` Python 3\n{RIGHT}\n```",
    "python3.11": f"```python3.11\n{RIGHT}\n```",
    "attributes": f'```python title="a.py" linenos\n{RIGHT}\n```',
    "braces": f"```{{.python .numberLines}}\n{RIGHT}\n```",
    "a file's name": f"```python:solution.py\n{RIGHT}\n```",
    "text before": f"Here is my solution: ```python\n{RIGHT}\n```",
    "text before, no language": f"Here is my solution: ```\n{RIGHT}\n```",
    "line ends of Windows": f"```python\n{RIGHT}\n```\nDone.".replace("\n", "\r\n"),
    "cut off": f"```python\n{RIGHT}",
    "no language, cut off": f"Words.\n```\n{RIGHT}",
    "other blocks first": f"```bash\npip install x\n```\n\n```\nTrue\n```\n\n```\n{RIGHT}\n```",
    "code in a span first": f"I use ```x``` and ```python```\n```\n{RIGHT}\n```",
    "example before": f"```python\nSolution().total([1])\n```\n```python\n{RIGHT}\n```",
    "example after": f"```python\n{RIGHT}\n```\n```python\nSolution().total([1])\n```",
    "draft before": f"```python\n{WRONG}\n```\nBetter:\n```python\n{RIGHT}\n```",
    "draft before, no language": f"```python\n{WRONG}\n```\nBetter:\n```\n{RIGHT}\n```",
    "draft not closed": f"```python\n{WRONG}\nNo, rather:\n```python\n{RIGHT}\n```",
    "thoughts with a draft": f"<think>\n```python\n{WRONG}\n```\n</think>\n\n```\n{RIGHT}\n```",
    "thoughts, draft not closed": f"<think>Say\n```python\n{WRONG}\n</think>\n\n```python\n{RIGHT}\n```",
    "thoughts begun by the prompt": f"Hm. ```x\n</think>```python\n{RIGHT}\n```",
    "thoughts that hold all": f"<think>\n```python\n{RIGHT}\n```\n</think>\n\nThat is it.",
    "fences in the code": f"```python\n{QUOTING}\n```",
    "fences in the code, four backticks": f"````python\n{QUOTING}\n````",
    "a fence in a string": f"```python\n{STARTS}\n```\nDone.",
    "inside another language": f"````markdown\n# Answer\n```python\n{RIGHT}\n```\n````",
}


@pytest.fixture(scope="module")
def people():
    with Sandbox(2, Limits(wall_s=2.0, cpu_s=1)) as sandbox:
        yield Grader(sandbox, any_fence=True)


def test_right_answers_as_people_have_them(people):
    grades = people.grade_all([(make_task("gt_only"), text) for text in SHAPES.values()])
    assert [name for name, grade in zip(SHAPES, grades, strict=True) if not grade.gt_correct] == []


@pytest.mark.parametrize("code", [*HACKS.values(), *FORGERIES.values(), RIGHT, WRONG])
def test_what_training_reads_is_read_the_same(code):
    assert readings(fenced(code)) == (extract_code(fenced(code)),)


@pytest.mark.parametrize("shape", ["no language", "tildes", "end of turn", "in a list", "text before"])
def test_a_hack_in_another_fence_is_that_hack(people, shape):
    hack = HACKS["stdout_marker"].strip()
    text = (
        SHAPES[shape].replace(IN_A_LIST, "\n".join(f"   {x}" for x in hack.splitlines())).replace(RIGHT, hack)
    )
    grade = people.grade(make_task("stdout_marker"), text)
    assert grade.exploited and not grade.gt_correct


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("no code", "no fence"),
        (RIGHT, "class Solution without a fence"),
        ("```\n[1, 2]\n```", "a fence without a language, and no class Solution in it"),
        (f"```java\n{RIGHT}\n```\n~~~js\nx\n~~~", "a fence of java, js"),
    ],
)
def test_what_is_not_read_says_what_was_seen(people, text, seen):
    assert unread(text) == seen and not readings(text)
    grade = people.grade(make_task("stdout_marker"), text)
    assert (grade.reward, grade.error) == (0.0, f"no ```python block: {seen}")
    assert Grader(people.sandbox).grade(make_task("gt_only"), text).error == "no ```python block"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```", "a"),
        ("```Python  \na\n```  ", "a"),
        ("```\na\n```", None),
        ("```python\na\nb", "a\nb"),
        ("```python\nclass Solution: 1\n```\n```python\nSolution()\n```", "class Solution: 1"),
        ("```python\nclass Solution: 1\n```\n```python\nclass Solution: 2\n```", "class Solution: 2"),
        ("```python\na\n```\n```python\nb\n```", "a"),
        ("```python\n'''\n    ```\n'''\n```", "'''\n    ```\n'''"),
        ("", None),
        # What the nano model writes at times, and is not paid for.
        ("```python\n```python\nclass Solution: 1\n```", "```python\nclass Solution: 1"),
        ("```python\nclass Solution: 1```", "class Solution: 1```"),
        ("```python x\nclass Solution: 1\n```", None),
    ],
)
def test_training_reads_the_fence_that_the_prompt_asks_for(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ({"role": "assistant", "content": "a"}, "a"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "no"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]}], "abc"),
        ([{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, {"text": "a"}]}], "a"),
        ([{"role": "user", "content": "q"}], None),
        ([{"role": "assistant", "content": None}], None),
        ([{"role": "assistant", "content": [{"type": "text", "text": 1}]}], None),
        (["a", "b"], None),
        ([], None),
        (None, None),
        (7, None),
    ],
)
def test_chat_messages_instead_of_a_string(value, text):
    assert completion_text(value) == text


@pytest.mark.parametrize(
    "unit", ["`", "``` ", "```x\n", "~~~\n", "<|a|>", "</think>", " ", "\n   ", "1. ```\n"]
)
def test_reading_takes_time_in_proportion_to_the_text(unit):
    """It is done by the trusted side, of whatever a model writes."""
    started = time.process_time()
    readings(f"```python\n{unit * (20_000 // len(unit))}x`")
    assert time.process_time() - started < 2
