"""The packed pair row gives what each response gives by itself, after the plain model."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from fpo_core.data.batches import PairIds, batches_by_length, collate
from fpo_core.data.conversations.model import ASSISTANT, Conversation, Turn
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import forward_pairs, scored_activations
from tests.tiny import SAE_LAYER, make_model, make_tokenizer

KINDS = ["llama", "llama-masked", "gemma2"]
HOOKS = [Hookpoint(SAE_LAYER)]

PAIRS = [
    PairIds("a", [0, 5, 9, 13], [7, 8, 21, 1], [30, 1]),
    PairIds("b", [0, 3], [11, 1], [12, 44, 45, 46, 47, 1]),
    PairIds("c", list(range(2, 20)), [100, 1], [101, 102, 1]),
    PairIds("one-token", [0, 2, 4], [1], [9]),
]


def plain(model, prompt, response, layer):
    """Float64 log-prob and activations of one response, by the model's own forward and logits."""
    ids = torch.tensor([[*prompt, *response]])
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    handle.remove()
    scored = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    logps = torch.log_softmax(logits[scored], -1)
    picked = logps.gather(1, torch.tensor(response)[:, None]).sum()
    return picked, seen[0][0][scored]


@pytest.mark.parametrize("kind", KINDS)
def test_pair_rows_equal_separate_responses(kind):
    model = make_model(kind)
    batch = collate(PAIRS, pad_id=3)
    with torch.no_grad():
        out = forward_pairs(model, batch, HOOKS)
    for row, pair in enumerate(PAIRS):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            logp, activations = plain(model, pair.prompt, response, SAE_LAYER)
            number = 2 * row + side
            assert batch.lengths[number] == len(response)
            torch.testing.assert_close(out.logps[number], logp, rtol=1e-5, atol=1e-4)
            got = out.activations[0][batch.response == number]
            torch.testing.assert_close(got, activations, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind):
    model = make_model(kind)
    with torch.no_grad():
        together = forward_pairs(model, collate(PAIRS), HOOKS).logps.reshape(-1, 2)
        for row, pair in enumerate(PAIRS):
            alone = forward_pairs(model, collate([pair]), HOOKS).logps
            torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_gives_the_same_numbers(kind):
    """Log-probs and activations, the latter in the same order of scored tokens."""
    model = make_model(kind)
    sides = []
    for side in ("right", "left"):
        batch = collate(PAIRS, pad_id=3, padding_side=side)
        with torch.no_grad():
            out = forward_pairs(model, batch, HOOKS)
        sides.append((out.logps, out.activations[0], batch.targets, batch.response, batch.lengths))
    for right, left in zip(*sides, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_pair_rows_equal_transformers_own_padding(kind, side):
    """One response a row, padded on either side, with the masks that transformers makes itself."""
    model = make_model(kind)
    rows = [[*p.prompt, *ids] for p in PAIRS for ids in (p.chosen, p.rejected)]
    responses = [len(ids) for p in PAIRS for ids in (p.chosen, p.rejected)]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.double()
        ours = forward_pairs(model, collate(PAIRS), HOOKS).logps
    for number, (row, count) in enumerate(zip(rows, responses, strict=True)):
        end = width if side == "left" else len(row)
        logps = torch.log_softmax(logits[number, end - count - 1 : end - 1], -1)
        want = logps.gather(1, torch.tensor(row[-count:])[:, None]).sum()
        torch.testing.assert_close(ours[number], want, rtol=1e-5, atol=1e-4)


def test_multi_turn_and_system_prompts_score_the_last_answer_alone():
    """Earlier turns, an assistant's too, are prompt: against the whole conversation's logits."""
    tokenizer, model = make_tokenizer(), make_model()
    turns = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "quick?"},
        {"role": "assistant", "content": "brown"},
        {"role": "user", "content": "lazy?"},
    ]
    prompt = tuple(Turn(turn["role"], turn["content"]) for turn in turns)
    sides = [(Turn(ASSISTANT, text),) for text in ("the dog", "jumps over")]
    given = Conversation(prompt, sides[0], sides[1], "line 1")
    (found,) = Tokenizer(ChatFormat(tokenizer, "model"), Limits(100, 100)).tokenize([given])
    assert isinstance(found, TokenizedPair)
    batch = collate([PairIds("x", found.prompt_ids, found.chosen_ids, found.rejected_ids)])
    with torch.no_grad():
        logps = forward_pairs(model, batch, HOOKS).logps
    for number, answer in enumerate(("the dog", "jumps over")):
        scored = batch.targets[batch.response == number]
        assert tokenizer.decode(scored) == f"{answer}<|im_end|>"
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], tokenize=False
        )
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = len(ids) - 1 - len(scored)  # the template writes one newline after the last turn
        with torch.no_grad():
            every = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        want = every[start - 1 : -2].gather(1, ids[start:-1, None]).sum()
        torch.testing.assert_close(logps[number], want, rtol=1e-5, atol=1e-4)


def test_stopping_early_gives_the_same_activations():
    model = make_model()
    batch = collate(PAIRS)
    with torch.no_grad():
        full = forward_pairs(model, batch, HOOKS).activations[0]
        early = scored_activations(model, batch, HOOKS)[0]
    assert torch.equal(full, early)


@pytest.mark.parametrize("kind", KINDS)
def test_hookpoints_are_transformers_own_tensors(kind):
    """``hidden_states`` of transformers: after block l at l + 1, the last one after the norm."""
    model = make_model(kind)
    places = [Hookpoint(0), Hookpoint(1), Hookpoint(2, "final_norm"), Hookpoint(2)]
    batch = collate([PairIds("x", [0, 5, 9], [7, 8, 1], [7, 8, 1])])
    ids = torch.tensor([[0, 5, 9, 7, 8, 1]])
    with torch.no_grad():
        found = forward_pairs(model, batch, places).activations
        stopped = scored_activations(model, batch, places)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        after_norm = model.model.norm(found[3][:3])
    for value, early, state in zip(found[:3], stopped[:3], (1, 2, 3), strict=True):
        torch.testing.assert_close(value[:3], states[state][0, 2:5], rtol=1e-5, atol=1e-5)
        assert torch.equal(value, early)
    torch.testing.assert_close(found[2][:3], after_norm)


def test_attention_by_parts_has_the_masks_gradients(monkeypatch):
    """In float64, on either side's padding, with no call of the masked attention."""
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", None)
    grads = []
    for kind in ("llama", "llama-masked"):
        model = make_model(kind).double().train()
        for side in ("right", "left"):
            out = forward_pairs(model, collate(PAIRS, padding_side=side), HOOKS)
            (out.logps.sum() + out.activations[0].square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, masked in grads[1].items():
        torch.testing.assert_close(grads[0][name], masked, rtol=1e-9, atol=1e-9)


def test_a_model_that_attends_by_parts_generates_and_saves_as_any_other(tmp_path):
    model, masked = make_model(), make_model("llama-masked")
    ids = torch.tensor([[3, 3, 5, 9, 13], [5, 6, 7, 8, 9]])
    options = {"attention_mask": (ids != 3).long(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), masked.generate(ids, **options))
    model.save_pretrained(tmp_path / "parts")
    masked.save_pretrained(tmp_path / "masked")
    written = [(tmp_path / name / "config.json").read_text() for name in ("parts", "masked")]
    assert written[0] == written[1]


def test_activation_checkpointing_keeps_values_and_gradients():
    model = make_model().train()
    batch = collate(PAIRS)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        out = forward_pairs(model, batch, HOOKS)
        (out.logps.sum() + out.activations[0].square().sum()).backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        results.append((out.logps.detach(), out.activations[0].detach(), gradient))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before)


def test_collate_shows_its_layout():
    batch = collate([PairIds("x", [10, 11], [20, 21, 1], [30, 1]), PairIds("y", [10], [1], [2])], 9)
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 1, 30, 1], [10, 1, 2, 9, 9, 9, 9]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 2, 3]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2], [0, 1, 2, -1, -1, -1, -1]]
    assert batch.positions.tolist() == [1, 2, 3, 1, 5, 7, 7]
    assert batch.targets.tolist() == [20, 21, 1, 30, 1, 1, 2]
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert batch.num_tokens == 10


def test_batches_respect_the_budget_and_cover_every_row():
    lengths = [3, 50, 7, 7, 49, 120, 8]
    batches = list(batches_by_length(lengths, 100))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert batches[0] == [5]  # longer than the budget: alone
    for batch in batches[1:]:
        assert max(lengths[row] for row in batch) * len(batch) <= 100
