"""List 200 responses judged by hand by the papers' rules (docs/method.md, 5), before any code ran.

They are right, wrong, malformed and borderline.
"""

from __future__ import annotations

import json

R, W = True, False

# ---- multiple choice: what follows the last <answer>, up to the next </answer>, stripped, equals the letter
# -----------------

CHOICE_CASES: list[tuple[str, str, bool]] = [  # (gold, response, right?)
    # plainly right
    ("A", "<answer>A</answer>", R),
    ("B", "<answer>B</answer>", R),
    ("C", "<answer>C</answer>", R),
    ("D", "<answer>D</answer>", R),
    ("B", "<reasoning>\nBecause.\n</reasoning>\n<answer>\nB\n</answer>", R),
    ("B", "<reasoning>A? No. C? No.</reasoning><answer>B</answer>", R),
    ("B", "<answer> B </answer>", R),
    ("B", "<answer>\n\nB\n\n</answer>\n", R),
    ("B", "<answer>\tB\t</answer>", R),
    ("B", "<answer>B</answer>\nI am confident.", R),
    ("B", "<answer>B</answer> The answer is A.", R),
    ("B", "A is wrong, C is wrong, D is wrong. <answer>B</answer>", R),
    ("D", "<reasoning>½ · 3 = 1.5 → D</reasoning>\n\n<answer>D</answer>", R),
    ("A", "<think>\n\n</think>\n\n<reasoning>x</reasoning>\n<answer>A</answer>", R),
    ("C", "<reasoning>" + "step " * 500 + "</reasoning><answer>C</answer>", R),
    # the last block counts
    ("B", "<answer>A</answer><answer>B</answer>", R),
    ("B", "<answer>A</answer> Wait. <answer>C</answer> No: <answer>B</answer>", R),
    ("B", "I will write <answer> tags. <answer>B</answer>", R),
    ("B", "<answer><answer>B</answer>", R),
    ("B", "<answer>A <answer>B</answer>", R),
    ("B", "<answer>B</answer></answer>", R),
    ("B", "</answer><answer>B</answer>", R),
    ("B", "<answer>B</answer><answer>A</answer>", W),
    ("B", "<answer>B</answer><answer></answer>", W),
    ("B", "<answer>B</answer> <answer>", W),
    ("B", "<answer>B</answer> I was told to use <answer> and </answer>.", W),
    ("B", "<answer>B</answer><answer>b</answer>", W),
    ("B", "<answer>B</answer><answer>B.</answer>", W),
    ("B", "<answer>B</answer> or <answer>C", W),
    ("B", "<answer>A</answer> or <answer>B", R),
    # a tag is missing: the answer ends with the text
    ("B", "B", R),
    ("B", " B\n", R),
    ("B", "\n\nB", R),
    ("A", "A", R),
    ("B", "<answer>B", R),
    ("B", "<answer>\nB\n", R),
    ("B", "<reasoning>So it is.</reasoning><answer>B", R),
    ("B", "B</answer>", R),
    ("B", "B</answer> and more", R),
    ("B", "A", W),
    ("B", "<answer>A", W),
    ("B", "A</answer>", W),
    ("B", "The answer is B", W),
    ("B", "The answer is B</answer>", W),
    ("B", "<answer>B and that is final", W),
    ("B", "<answer>B\nBecause it is.", W),
    ("B", "<reasoning>B</reasoning>", W),
    ("B", "<reasoning>B", W),
    ("B", "</answer>B", W),
    ("B", "</answer>B<answer>", W),
    # plainly wrong
    ("B", "<answer>A</answer>", W),
    ("B", "<answer>C</answer>", W),
    ("B", "<answer>D</answer>", W),
    ("A", "<answer>B</answer>", W),
    ("C", "<reasoning>C is right</reasoning><answer>D</answer>", W),
    ("D", "<answer>E</answer>", W),
    ("B", "", W),
    ("B", " \n", W),
    ("B", "<answer></answer>", W),
    ("B", "<answer>\n</answer>", W),
    ("B", "I do not know.", W),
    ("B", "<answer>I do not know</answer>", W),
    # more than the letter
    ("B", "<answer>B.</answer>", W),
    ("B", "<answer>B:</answer>", W),
    ("B", "<answer>B)</answer>", W),
    ("B", "<answer>(B)</answer>", W),
    ("B", "<answer>[B]</answer>", W),
    ("B", '<answer>"B"</answer>', W),
    ("B", "<answer>'B'</answer>", W),
    ("B", "<answer>**B**</answer>", W),
    ("B", "<answer>$B$</answer>", W),
    ("B", "<answer>\\boxed{B}</answer>", W),
    ("B", "<answer>B: 42</answer>", W),
    ("B", "<answer>Option B</answer>", W),
    ("B", "<answer>The answer is B</answer>", W),
    ("B", "<answer>A, B</answer>", W),
    ("B", "<answer>A B C D</answer>", W),
    ("B", "<answer>B or C</answer>", W),
    ("B", "<answer>BB</answer>", W),
    ("B", "<answer>B\nB</answer>", W),
    ("B", "<answer>B B</answer>", W),
    ("B", "<answer>not B</answer>", W),
    ("B", "<answer>2</answer>", W),
    ("B", "B.", W),
    # other letters that look alike, other tags
    ("B", "<answer>b</answer>", W),
    ("A", "<answer>a</answer>", W),
    ("B", "b", W),
    ("B", "<answer>Β</answer>", W),  # Greek
    ("B", "<answer>В</answer>", W),  # Cyrillic
    ("B", "<answer>Ｂ</answer>", W),  # full width
    ("B", "<answer>B\u200b</answer>", W),  # zero-width space is no white space
    ("B", "<answer>\u00a0B\u2003</answer>", R),  # these are
    ("B", "<Answer>B</Answer>", W),
    ("B", "<ANSWER>B</ANSWER>", W),
    ("B", "<answer >B</answer>", W),
    ("B", "<answer>B</ answer>", W),
    ("B", "<answer>B<answer/>", W),
    ("B", "&lt;answer&gt;B&lt;/answer&gt;", W),
    ("B", "[answer]B[/answer]", W),
    ("B", "```\n<answer>B</answer>\n```", R),
]

# ---- tool use: the multiset of names equals gold's, and the inputs merged into one object equal gold's
# merged ----------------


def gold(*calls: tuple[str, str]) -> str:
    """Return a published answer."""
    return json.dumps([{"Action": name, "Action_Input": text} for name, text in calls])


def said(*calls: tuple[str, str]) -> str:
    """Return a response in the required form."""
    return "".join(
        f"Thought: I should call it.\nAction: {name}\nAction Input: {text}\n" for name, text in calls
    )


NONE = gold(("getAll", "{}"))
ONE = gold(("search", '{"q": "cat", "page": 1}'))
TWO = gold(("login", '{"user": "ann"}'), ("list", '{"limit": 5}'))
SAME = gold(("search", '{"size": "small", "page": 1}'), ("search", '{"size": "large", "page": 1}'))
NESTED = gold(("update", '{"id": 7, "data": {"url": "http://x/y.jpg", "tags": ["a", "b"]}}'))
OPTIONAL = gold(("getUser", '{"id": "u1"}'), ("[Optional]update", '{"id": "u1", "on": true}'))
TEXT = gold(("post", '{"text": "a {brace} and \\"quotes\\" and Action: x"}'))

TOOL_CASES: list[tuple[str, str, bool]] = [  # (gold, response, right?)
    # plainly right
    (NONE, said(("getAll", "{}")), R),
    (NONE, "Action: getAll\nAction Input: {}", R),
    (NONE, "Action: getAll\nAction Input: { }", R),
    (ONE, said(("search", '{"q": "cat", "page": 1}')), R),
    (ONE, said(("search", '{"page": 1, "q": "cat"}')), R),  # keys have no order
    (ONE, said(("search", '{"q":"cat","page":1}')), R),
    (ONE, said(("search", '{\n  "q": "cat",\n  "page": 1\n}')), R),
    (ONE, 'Action:search\nAction Input:{"q": "cat", "page": 1}', R),
    (ONE, 'Action:   search  \nAction Input:   {"q": "cat", "page": 1}   \n\n', R),
    (ONE, 'Action: search\nAction Input:\n{"q": "cat", "page": 1}', R),
    (ONE, 'Action: search\n\nAction Input: {"q": "cat", "page": 1}\nDone.', R),
    (ONE, 'Thought: first think\nthen act\nAction: search\nAction Input: {"q": "cat", "page": 1}', R),
    (ONE, said(("search", '{"q": "\\u0063at", "page": 1}')), R),
    (TWO, said(("login", '{"user": "ann"}'), ("list", '{"limit": 5}')), R),
    (TWO, said(("list", '{"limit": 5}'), ("login", '{"user": "ann"}')), R),  # a multiset
    (TWO, 'Action: login\nAction: list\nAction Input: {"user": "ann"}\nAction Input: {"limit": 5}', R),
    (NESTED, said(("update", '{"id": 7, "data": {"url": "http://x/y.jpg", "tags": ["a", "b"]}}')), R),
    (NESTED, said(("update", '{"data": {"tags": ["a", "b"], "url": "http://x/y.jpg"}, "id": 7}')), R),
    (
        NESTED,
        said(
            ("update", '{\n "id": 7,\n "data": {\n  "url": "http://x/y.jpg",\n  "tags": [\n "a", "b"]\n }\n}')
        ),
        R,
    ),
    (OPTIONAL, said(("getUser", '{"id": "u1"}'), ("[Optional]update", '{"id": "u1", "on": true}')), R),
    (TEXT, said(("post", '{"text": "a {brace} and \\"quotes\\" and Action: x"}')), R),
    (SAME, said(("search", '{"size": "small", "page": 1}'), ("search", '{"size": "large", "page": 1}')), R),
    # names
    (ONE, said(("Search", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("search()", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("search.", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("`search`", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("searchAll", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("sea rch", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("search, search", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("sеarch", '{"q": "cat", "page": 1}')), W),  # a Cyrillic e
    (TWO, said(("login", '{"user": "ann"}'), ("login", '{"limit": 5}')), W),
    (TWO, said(("list", '{"user": "ann"}'), ("list", '{"limit": 5}')), W),
    (
        OPTIONAL,
        said(("getUser", '{"id": "u1"}'), ("update", '{"id": "u1", "on": true}')),
        W,
    ),  # names as written
    (OPTIONAL, said(("getUser", '{"id": "u1"}')), W),
    # how many calls
    (ONE, said(("search", '{"q": "cat", "page": 1}'), ("search", '{"q": "cat", "page": 1}')), W),
    (ONE, said(("search", '{"q": "cat", "page": 1}'), ("getAll", "{}")), W),
    (TWO, said(("login", '{"user": "ann"}')), W),
    (TWO, said(("list", '{"limit": 5}')), W),
    (TWO, said(("login", '{"user": "ann", "limit": 5}')), W),
    (TWO, said(("login", '{"user": "ann"}'), ("list", '{"limit": 5}'), ("list", '{"limit": 5}')), W),
    (SAME, said(("search", '{"size": "large", "page": 1}')), W),
    # inputs
    (NONE, said(("getAll", '{"page": 1}')), W),
    (ONE, said(("search", "{}")), W),
    (ONE, said(("search", '{"q": "cat"}')), W),
    (ONE, said(("search", '{"q": "cat", "page": 2}')), W),
    (ONE, said(("search", '{"q": "cats", "page": 1}')), W),
    (ONE, said(("search", '{"q": "Cat", "page": 1}')), W),
    (ONE, said(("search", '{"q": " cat", "page": 1}')), W),
    (ONE, said(("search", '{"q": "cat", "page": "1"}')), W),
    (ONE, said(("search", '{"q": ["cat"], "page": 1}')), W),
    (ONE, said(("search", '{"Q": "cat", "page": 1}')), W),
    (ONE, said(("search", '{"q": "cat", "page": 1, "size": ""}')), W),
    (ONE, said(("search", '{"q": "cat", "page": null}')), W),
    (ONE, said(("search", '{"q": "dog", "q": "cat", "page": 1}')), R),  # a repeated key: the later one
    (ONE, said(("search", '{"q": "cat", "q": "dog", "page": 1}')), W),
    (ONE, said(("search", '{"q": "cat", "page": 1.0}')), R),  # equal as numbers
    (ONE, said(("search", '{"q": "cat", "page": true}')), R),  # as Python compares
    (ONE, said(("search", '{"q": "cat", "page": 1e0}')), R),
    (
        NESTED,
        said(("update", '{"id": 7, "data": {"url": "http://x/y.jpg", "tags": ["b", "a"]}}')),
        W,
    ),  # lists have an order
    (NESTED, said(("update", '{"id": 7, "data": {"url": "http://x/y.jpg"}}')), W),
    (NESTED, said(("update", '{"id": 7, "url": "http://x/y.jpg", "tags": ["a", "b"]}')), W),
    (
        NESTED,
        said(
            (
                "update",
                '{"id": 7, "data": "{\\"url\\": \\"http://x/y.jpg\\", \\"tags\\": [\\"a\\", \\"b\\"]}"}',
            )
        ),
        W,
    ),
    (NESTED, said(("update", '{"id": "7", "data": {"url": "http://x/y.jpg", "tags": ["a", "b"]}}')), W),
    (TEXT, said(("post", '{"text": "a {brace} and quotes and Action: x"}')), W),
    # merging loses which call had what: the papers' rule does not see it
    (TWO, said(("login", '{"limit": 5}'), ("list", '{"user": "ann"}')), R),
    (TWO, said(("login", '{"user": "ann", "limit": 5}'), ("list", "{}")), R),
    (TWO, said(("login", '{"user": "bob"}'), ("list", '{"user": "ann", "limit": 5}')), R),
    (SAME, said(("search", '{"size": "large", "page": 1}'), ("search", '{"size": "large", "page": 1}')), R),
    (SAME, said(("search", '{"size": "wrong", "page": 9}'), ("search", '{"size": "large", "page": 1}')), R),
    (
        SAME,
        said(("search", '{"size": "large", "page": 1}'), ("search", '{"size": "small", "page": 1}')),
        W,
    ),  # the last call wins
    (TWO, said(("login", '{"user": "ann"}'), ("list", '{"user": "bob", "limit": 5}')), W),
    (OPTIONAL, said(("[Optional]update", '{"id": "u1", "on": true}'), ("getUser", '{"id": "u1"}')), R),
    # malformed
    (ONE, "", W),
    (ONE, "search", W),
    (ONE, "Action: search", W),
    (ONE, 'Action Input: {"q": "cat", "page": 1}', W),
    (NONE, "Action: getAll", W),
    (NONE, "Action: getAll\nAction Input:", W),
    (NONE, "Action: getAll\nAction Input: none", W),
    (NONE, "Action: getAll\nAction Input: []", W),
    (NONE, "Action: getAll\nAction Input: null", W),
    (NONE, 'Action: getAll\nAction Input: "{}"', W),
    (NONE, "Action: getAll\nAction Input: {", W),
    (NONE, "Action: getAll\nAction Input: }", W),
    (ONE, said(("search", "{'q': 'cat', 'page': 1}")), W),
    (ONE, said(("search", '{"q": "cat", "page": 1,}')), W),
    (ONE, said(("search", '{"q": "cat", "page": 1')), W),
    (ONE, said(("search", '{q: "cat", page: 1}')), W),
    (ONE, said(("search", '{"q": "cat" "page": 1}')), W),
    (ONE, said(("search", '"q": "cat", "page": 1')), W),
    (ONE, said(("search", '```json\n{"q": "cat", "page": 1}\n```')), W),
    (
        ONE,
        said(("search", '{"q": "cat", "page": 1} // done')),
        R,
    ),  # the object is complete, what follows is not read
    (ONE, said(("search", '{"q": "cat", "page": 1}}')), R),
    (TWO, said(("login", '{"user": "ann"}'), ("list", "{limit: 5}")), W),
    (ONE, 'action: search\naction input: {"q": "cat", "page": 1}', W),
    (ONE, 'Action search\nAction Input {"q": "cat", "page": 1}', W),
    (ONE, 'Tool: search\nInput: {"q": "cat", "page": 1}', W),
    (ONE, '{"Action": "search", "Action Input": {"q": "cat", "page": 1}}', W),
    (ONE, 'search(q="cat", page=1)', W),
]
