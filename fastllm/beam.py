"""Beam search over a session: the likeliest continuation that `beams` of them, kept side by side, lead to."""

import torch

from fastllm.sampling import penalised


@torch.no_grad()
def beam_search(
    session,
    prompt,
    beams,
    max_new_tokens,
    eos=(),
    *,
    length_penalty=1.0,
    early_stopping=False,
    repetition_penalty=1.0,
    seen=None,
) -> list[int]:
    """The tokens that continue `prompt` [length] int64, as Hugging Face's beam search chooses them.

    The score of a text is the sum of its tokens' log-probabilities over length ** length_penalty. It ends when `beams`
    texts are complete and the best unfinished one scores below them all (early_stopping: when they are complete).
    repetition_penalty falls on the tokens `seen` (default: the prompt) and on those that are chosen. The session has at
    least `beams` slots, all of which are this search's. A beam keeps its slot as long as something continues it; a
    second continuation takes that of a beam that nothing continues, and only what follows the prompt is copied.
    """
    seen = prompt if seen is None else seen
    for slot in range(beams):
        session.clear(slot)
    logits = session.prefill([prompt], torch.tensor([0]))
    if beams > 1:
        session.copy(torch.zeros(beams - 1, dtype=torch.int64), torch.arange(1, beams))
    running, finished = [(0.0, 0, [])], []  # (score, slot, tokens); (score over length, tokens), the best first
    for length in range(1, max_new_tokens + 1):
        logp = logits.log_softmax(-1)
        if repetition_penalty != 1.0:
            ids = torch.stack([torch.cat([seen, torch.tensor(tokens, dtype=torch.int64)]) for *_, tokens in running])
            logp = penalised(logp, ids, repetition_penalty)
        total = torch.tensor([score for score, *_ in running])[:, None] + logp
        # So many that, whatever ends, as many go on.
        best = total.flatten().topk(min(total.numel(), max(2, 1 + len(eos)) * beams))
        alive = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            _, slot, tokens = running[place // logp.shape[1]]
            token = place % logp.shape[1]
            if token not in eos and length < max_new_tokens:
                alive.append((score, slot, [*tokens, token]))
            elif rank < beams:
                finished.append((score / length**length_penalty, [*tokens, token]))
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        complete = len(finished) == beams
        if not alive or (complete and (early_stopping or alive[0][0] / length**length_penalty <= finished[-1][0])):
            break
        running = _into_slots(session, alive[:beams], beams, len(prompt))
        slots = torch.tensor([slot for _, slot, _ in running])
        logits = session.step(torch.tensor([tokens[-1] for *_, tokens in running]), slots)
    return finished[0][1]


def _into_slots(session, alive, beams, since):
    """The beams with a slot each, where what they continue has been copied to."""
    taken, sources, targets, placed = set(), [], [], []
    free = sorted(set(range(beams)) - {slot for _, slot, _ in alive})
    for score, slot, tokens in alive:
        if slot in taken:
            sources.append(slot)
            slot = free.pop()
            targets.append(slot)
        taken.add(slot)
        placed.append((score, slot, tokens))
    if sources:
        session.copy(torch.tensor(sources), torch.tensor(targets), since)
    return placed
