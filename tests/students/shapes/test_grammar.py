from edgegen.students.shapes import family
from edgegen.students.shapes.grammar import held_back, one_object_scenes, training_scenes, two_object_scenes


def test_held_back_list_is_large_fixed_and_never_trained_on():
    scenes = held_back()
    assert len(scenes) >= 400
    assert len(set(scenes)) == len(scenes)
    assert scenes == held_back()
    one, two = training_scenes()
    trained = {*one, *two}
    assert not trained & set(scenes)
    assert len(trained) + len(scenes) == len(one_object_scenes()) + len(two_object_scenes())


def test_held_back_list_has_not_moved():
    # The list is what every published alignment is over: a change of it is a change of the benchmark.
    prompts = [scene.prompt() for scene in held_back()]
    assert (prompts[0], prompts[108], prompts[431]) == (
        "a small red triangle on the right",
        "a large green square left of a small green square",
        "a small blue circle above a small green triangle",
    )


def test_every_prompt_fits_the_tokenizer_without_unknown_words():
    tokenizer = family.tokenizer()
    unknown = tokenizer.token_to_id(family.UNKNOWN)
    one, two = training_scenes()
    for encoding in tokenizer.encode_batch([scene.prompt() for scene in (*held_back(), *one, *two)]):
        assert unknown not in encoding.ids
        assert len(encoding.ids) == family.CONTEXT_LENGTH
        assert not encoding.overflowing


def test_an_unknown_word_has_its_own_id():
    tokenizer = family.tokenizer()
    assert tokenizer.token_to_id(family.UNKNOWN) in tokenizer.encode("a small mauve circle").ids
