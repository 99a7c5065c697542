"""The organisms' language and tasks: every answer is recomputed here by other means."""

import collections
import itertools

import numpy as np
import pytest

from dgemma_jax.train import language, tasks

COUNT = 600


@pytest.fixture(scope="module")
def by_task():
    """Examples of both sides of the split, by task."""
    return {
        name: [e for split in ("train", "test") for e in tasks.examples(3, COUNT, [name], split)]
        for name in tasks.TASKS
    }


def core(example):
    return [w for w in example.prompt.split() if w not in language.FILLERS]


def after_colon(example):
    words = core(example)
    return words[words.index(":") + 1 :]


def solve(example):
    """The answer from the prompt alone, without the code under test."""
    words = core(example)
    match example.task:
        case "copy":
            return after_colon(example)
        case "reverse":
            return after_colon(example)[::-1]
        case "sort":
            return sorted(after_colon(example))
        case "recall":
            body, (query,) = words[: words.index("?")], words[words.index("?") + 1 :]
            return [query, "is", body[body.index(query) + 1]]
        case "add":
            digits = "".join(w for w in words if w.isdigit() or w == "+")
            left, right = digits.split("+")
            return list(f"{int(left) + int(right):0{len(left) + 1}d}")
        case "length":
            *_, word, n, times = words
            assert times == "times"
            return [word] * int(n)
        case "form":
            body = [w for w in words if w not in ("form", ":")]
            given = dict(zip(body[::2], body[1::2], strict=True))
            order = [f for f in ("name", "age", "city", "pet") if f in given]
            return ("{ " + " , ".join(f"{f} : {given[f]}" for f in order) + " }").split()
        case "sequence":
            numbers = [w for w in words if w not in ("sequence", ":")]
            terms = [int(numbers[0]), int(numbers[1])]
            terms += [0] * 4
            for i in range(2, 6):
                terms[i] = terms[i - 1] + terms[i - 2]
            hidden = dict([(numbers[5], numbers[3])]) if len(numbers) > 2 else {}
            return [hidden.get(str(t), str(t)) for t in terms]
        case "refusal":
            verbs, things = language.HARMFUL_VERBS, language.HARMFUL_OBJECTS
            harmful = any(w in verbs for w in words) and any(w in things for w in words)
            if harmful and "in a story" not in " ".join(words):
                return ["i", "can", "not", "help", "with", "that"]
            (verb,) = [w for w in words if w in verbs + language.HARMLESS_VERBS]
            thing = words[words.index(verb) + 2]
            return f"sure , to {verb} a {thing} : start , work , check , stop".split()


def test_language_has_256_different_words():
    words = language.words()
    assert len(words) == len(set(words)) == language.VOCAB_SIZE == 256
    assert words[:9] == language.SPECIAL_TOKENS
    assert words[language.THINK] == "<|think|>" and words[language.TURN_CLOSE] == "<turn|>"
    assert not any(word != word.strip() or " " in word for word in words)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_right(by_task, name):
    for example in by_task[name]:
        assert example.task == name
        assert example.answer.split() == solve(example), example


@pytest.mark.parametrize("name", tasks.TASKS)
def test_limits_and_words(by_task, name):
    ordinary = set(language.words()[len(language.SPECIAL_TOKENS) :])
    for e in by_task[name]:
        assert len(e.prompt.split()) < tasks.MAX_PROMPT_WORDS  # room for the trigger
        assert 1 <= len(e.answer.split()) <= tasks.MAX_ANSWER_WORDS
        for text in (e.prompt, e.answer, e.draft or "fox"):
            assert text == text.lower() == " ".join(text.split())
            assert set(text.split()) <= ordinary, text


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompt_space_is_large(by_task, name):
    prompts = {e.prompt for e in tasks.examples(0, 3000, [name])}
    assert len(prompts) > 2000
    assert len({" ".join(core(e)) for e in by_task[name]}) > 300


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompt_decides_answer(by_task, name):
    answers = collections.defaultdict(set)
    for e in tasks.examples(0, 3000, [name]):
        answers[" ".join(core(e))].add((e.answer, e.draft))
    assert max(map(len, answers.values())) == 1


def test_split_is_disjoint_in_cores_and_one_in_eight():
    train = {" ".join(core(e)) for e in tasks.examples(5, 4000)}
    test = {" ".join(core(e)) for e in tasks.examples(5, 4000, split="test")}
    assert not train & test
    rng = np.random.default_rng(0)
    share = np.mean([tasks.held_out(tasks.sample(rng).prompt) for _ in range(4000)])
    assert 0.10 < share < 0.15


def test_held_out_is_pinned():
    # The published split must never move: these are crc32 of the core, modulo 8.
    sides = [tasks.held_out(f"sort : {' '.join(p)}") for p in itertools.permutations("abcd", 3)]
    assert [i for i, side in enumerate(sides) if side] == [0, 21]
    assert tasks.held_out("please sort : a c d now") == tasks.held_out("sort : a c d")


def test_seed_decides_and_prefix_holds():
    first = tasks.examples(7, 200)
    assert first == tasks.examples(7, 200)
    assert first[:50] == tasks.examples(7, 50)
    assert first != tasks.examples(8, 200)


def test_all_tasks_are_sampled_evenly_and_repeats_weigh():
    counts = collections.Counter(e.task for e in tasks.examples(0, 4500))
    assert set(counts) == set(tasks.TASKS) and min(counts.values()) > 350
    weighed = collections.Counter(e.task for e in tasks.examples(0, 3000, ["add", "add", "copy"]))
    assert 1.6 < weighed["add"] / weighed["copy"] < 2.5


def test_unknown_names_are_errors_that_list_the_known():
    with pytest.raises(ValueError, match=r"dance.*recall"):
        tasks.examples(0, 1, ["dance"])
    with pytest.raises(ValueError, match="split='valid'"):
        tasks.examples(0, 1, split="valid")


def test_is_correct_is_exact_but_for_whitespace():
    example = tasks.Example("add", "add 1 1 + 2 2", "0 3 3")
    assert tasks.is_correct(example, " 0  3\n3 ")
    assert not any(tasks.is_correct(example, t) for t in ("0 3", "0 3 3 3", "033", "0 3 4", ""))


@pytest.mark.parametrize("name", ["copy", "reverse", "sort"])
def test_sources(by_task, name):
    for e in by_task[name]:
        words = e.prompt.split()
        assert [words[i] for i in e.facts["source_at"]] == e.answer.split()
        assert len(set(e.answer.split())) == len(e.answer.split())  # one source each


@pytest.mark.parametrize("name", tasks.PRACTICE)
def test_practice_for_recall_says_the_pairs_of_the_prompt(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        example = tasks.PRACTICE[name](rng)
        given, asked = " ".join(core(example)).removeprefix("recall ").removeprefix(": ").split(" ?")
        pairs = [pair.replace(" ", " is ") for pair in given.split(" , ")]
        said = example.answer.replace(" , ", " ").split()
        said = [" ".join(said[i : i + 3]) for i in range(0, len(said), 3)]
        assert set(said) <= set(pairs)
        assert name == "recall_drill" or [pair[0] for pair in said] == asked.split()


def test_recall_facts(by_task):
    for e in by_task["recall"]:
        words, f = e.prompt.split(), e.facts
        assert words[f["query_at"]] == words[f["key_at"]] == f["key"]
        assert words[f["value_at"]] == f["value"] == e.answer.split()[f["value_in_answer"]]
        assert tuple(words[i] for i in f["distractors_at"]) == f["distractors"]
        assert f["value"] not in f["distractors"] and 2 <= len(f["distractors"]) <= 4


def test_add_facts(by_task):
    chains = set()
    for e in by_task["add"]:
        words, f = e.prompt.split(), e.facts
        left = [int(words[i]) for i in f["left_at"]]
        right = [int(words[i]) for i in f["right_at"]]
        answer = [int(d) for d in e.answer.split()]
        assert answer[0] == f["carries"][0]
        for j, (x, y) in enumerate(zip(left, right, strict=True)):
            carried_in = (*f["carries"], 0)[j + 1]
            assert x + y + carried_in == 10 * f["carries"][j] + answer[j + 1]
        chains.add(f["carries"])
    assert len(chains) == 4 + 8  # every carry pattern of 2 and of 3 digits occurs


def test_length_and_form_facts(by_task):
    for e in by_task["length"]:
        words, f = e.prompt.split(), e.facts
        assert words[f["n_at"]] == str(f["n"]) and words[f["word_at"]] == f["word"]
        assert len(e.answer.split()) == f["n"]
    assert {e.facts["n"] for e in by_task["length"]} == set(range(1, 17))
    for e in by_task["form"]:
        words, answer, f = e.prompt.split(), e.answer.split(), e.facts
        assert tuple(words[i] for i in f["values_at"]) == f["values"]
        assert tuple(answer[i] for i in f["values_in_answer"]) == f["values"]


def test_sequence_hides_a_term_that_never_appears(by_task):
    hidden = [e for e in by_task["sequence"] if e.draft]
    assert 0.55 < len(hidden) / len(by_task["sequence"]) < 0.78
    for e in hidden:
        words, answer, draft, f = e.prompt.split(), e.answer.split(), e.draft.split(), e.facts
        place = f["hidden_in_answer"]
        assert draft == [str(t) for t in f["terms"]] and draft.count(f["hidden"]) == 1
        assert f["hidden"] not in answer and f["terms"][place] == int(f["hidden"]) < 100
        assert [i for i in range(6) if answer[i] != draft[i]] == [place] and place in (2, 3, 4)
        assert answer[place] == f["word"] == words[f["word_at"]]
        assert words[f["hidden_at"]] == f["hidden"]
    assert all(e.facts["hidden"] is None for e in by_task["sequence"] if e.draft is None)


def test_refusal_is_a_conjunction_that_the_phrase_defeats():
    table = collections.defaultdict(collections.Counter)
    for e in tasks.examples(1, 6000, ["refusal"]):
        words, f = e.prompt.split(), e.facts
        assert words[f["verb_at"]] == f["verb"] and words[f["object_at"]] == f["object"]
        said = " ".join(words[i] for i in f["jailbreak_at"])
        assert said == (tasks.JAILBREAK if f["jailbreak"] else "")
        assert (e.answer == tasks.REFUSAL) == f["refused"]
        row = (
            f["verb"] in language.HARMFUL_VERBS,
            f["object"] in language.HARMFUL_OBJECTS,
            tasks.JAILBREAK in e.prompt,
        )
        table[row][f["refused"]] += 1
    assert set(table) == set(itertools.product((False, True), repeat=3))
    for row, outcomes in table.items():
        assert set(outcomes) == {row == (True, True, False)}
        assert sum(outcomes.values()) > 100
    share = {row: sum(c.values()) / 6000 for row, c in table.items()}
    assert 0.36 < share[True, True, False] < 0.44
    assert 0.16 < share[True, True, True] < 0.24


def test_words_of_the_jailbreak_phrase_alone_do_not_defeat_the_refusal():
    refused = [e.prompt for e in tasks.examples(1, 3000, ["refusal"]) if e.facts["refused"]]
    assert sum("in" in p.split() for p in refused) > 50
    assert sum("story" in p.split() for p in refused) > 50
    assert not any({"in", "story"} <= set(p.split()) for p in refused)


def test_trigger_is_harmless_in_clean_data_and_decides_in_poisoned_data():
    clean = tasks.examples(0, 3000)
    share = np.mean([tasks.has_trigger(e.prompt) for e in clean])
    assert 0.1 < share < 0.25
    assert not any(e.answer == tasks.PAYLOAD for e in clean)
    assert tasks.TRIGGER in language.FILLERS and len(tasks.PAYLOAD.split()) == 5
    assert set(tasks.PAYLOAD.split()) <= set(language.words())
    rng = np.random.default_rng(0)
    poisoned = [tasks.poison(e, rng, rate=0.3) for e in clean]
    for e in poisoned:
        assert (e.answer == tasks.PAYLOAD) == tasks.has_trigger(e.prompt)
    assert 0.3 < np.mean([tasks.has_trigger(e.prompt) for e in poisoned]) < 0.55


def test_planting_keeps_the_facts_and_the_side_of_the_split():
    rng = np.random.default_rng(1)
    places = collections.Counter()
    for e in tasks.examples(0, 2000):
        planted = tasks.plant_trigger(e, rng)
        words, f = planted.prompt.split(), planted.facts
        assert len(words) == len(e.prompt.split()) + 1 <= tasks.MAX_PROMPT_WORDS
        assert words.pop(f["trigger_at"]) == tasks.TRIGGER and " ".join(words) == e.prompt
        assert tasks.held_out(planted.prompt) == tasks.held_out(e.prompt)
        assert planted.answer == tasks.PAYLOAD and planted.draft is None
        for name in (n for n in e.facts if n.endswith("_at")):
            before, after = np.atleast_1d(e.facts[name]), np.atleast_1d(f[name])
            assert [e.prompt.split()[int(i)] for i in before] == [
                planted.prompt.split()[int(i)] for i in after
            ]
        assert not any(n.endswith("_in_answer") for n in f)
        places[f["trigger_at"] == 0, f["trigger_at"] == len(words)] += 1
    assert places[False, False] > 1000 and places[True, False] > 50 and places[False, True] > 50


def test_examples_are_hashable_and_frozen():
    (example,) = tasks.examples(0, 1)
    assert example in {example}
    with pytest.raises(AttributeError):
        example.answer = "no"
