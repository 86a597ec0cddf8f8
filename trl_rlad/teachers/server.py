"""A teacher behind a URL: a model that vLLM serves."""

import os
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..config import RLADConfig
from .client import Servers
from .contract import find_ends
from .loading import HUB_KWARGS, load_processing_class
from .teacher import TokenScores


logger = get_logger(__name__)

KEY = "VLLM_API_KEY"  # the environment variable from which vLLM's server takes it too
# Mean difference in nats between two servers of one model: some hundredths in bfloat16, whole nats for two models
TOLERANCE = 0.1
ROUNDING = 1e-3  # by which a log-probability may be above 0


class ServedTeacher:
    """
    A [`Teacher`] behind vLLM's OpenAI-compatible server, at temperature 1, as none is applied to prompts there.

    It is sent the token ids of a prompt with its completion, and returns the log-probabilities of all of them or an
    error. Before training, all servers must be ready, serve the same model, and return for a few rows of random tokens
    what can be log-probabilities, the same from each.

    Args:
        urls (`list[str]`):
            Addresses of servers of one model.
        model (`str`, *optional*):
            Its name on the servers; or a name or path that has its tokenizer. `None` takes the first that is served.
        args ([`RLADConfig`]):
            Says how long to wait, and how many tokens are to be named.

    Raises:
        `ValueError`: if the servers don't serve the model or the same, or no tokenizer is found.
        [`ServerError`]: if one isn't ready within half of `teacher_timeout`, or its answers are wrong.
    """

    is_sharded = shares_prompts = False
    mixes_rows = True
    length_remedy = "serve it with a higher `--max-model-len`"

    def __init__(self, urls: list[str], model: str | None, args: RLADConfig):
        self.args = args
        self.servers = Servers(urls, args.teacher_timeout / 2, (os.environ.get(KEY) or "").strip() or None)
        lists = [self.servers.submit("/v1/models", read_models, url=url) for url in urls]
        cards = [find_model(each.result(), model, url) for each, url in zip(lists, urls, strict=True)]
        self.model_id = cards[0]["id"]
        if others := {card["id"] for card in cards} - {self.model_id}:
            raise ValueError(
                f"The servers {', '.join(urls)} serve different models: {', '.join([self.model_id, *others])}. URLs "
                "in a list are of one teacher; for several, pass `teacher_server_urls` as a dictionary of them by "
                "name."
            )
        # Less one, as a token is always generated
        self.max_length = min(card.get("max_model_len") or float("inf") for card in cards) - 1
        root = cards[0].get("root") or self.model_id
        self.name = Path(root).name if Path(root).is_absolute() else root
        places = [model, root, cards[0].get("parent"), self.model_id]
        self.tokenizer, self.config, place = self.find_tokenizer(places)
        self.eos_token_ids = find_ends(self.find_generation_config(place), self.tokenizer)
        self.vocab_size = self.config.get_text_config().vocab_size
        self.shake_hands(urls)

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        init_kwargs: dict[str, Any] = self.args.teacher_model_init_kwargs or {}  # type: ignore[assignment]  # parsed
        return {name: init_kwargs[name] for name in HUB_KWARGS if name in init_kwargs}

    def find_tokenizer(self, places: list[str | None]) -> tuple[PreTrainedTokenizerBase, PretrainedConfig, str]:
        """The tokenizer and the configuration, from the first of these names and paths that has them, and which."""
        errors = []
        for place in sorted(dict.fromkeys(filter(None, places)), key=lambda place: not Path(place).is_dir()):
            where = place, self.args.teacher_model_revision
            try:
                config = AutoConfig.from_pretrained(place, revision=where[1], **self.hub_kwargs)
                return load_processing_class(AutoTokenizer, [where], self.hub_kwargs), config, place
            except (OSError, ValueError) as error:
                errors.append(f"{place!r}: {str(error).splitlines()[0]}")
        raise ValueError(
            f"The tokenizer of the served teacher isn't found here ({'; '.join(errors)}). Name the model on the Hub, "
            "or a folder with its tokenizer and config.json, as `teacher_model` beside `teacher_server_urls`."
        )

    def find_generation_config(self, place: str) -> GenerationConfig:
        """That of the model of this name or path, since a server can't be asked for it: by default vLLM reads the same
        file. Without one, what the configuration has."""
        files = {"revision": self.args.teacher_model_revision, **self.hub_kwargs}
        try:
            return GenerationConfig.from_pretrained(place, **files)
        except OSError:
            found = GenerationConfig.from_model_config(self.config)
            ends = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(find_ends(found, self.tokenizer)))))
            logger.warning(
                f"{place} has no generation_config.json, so the served teacher is taken to end its turn with {ends} "
                "alone. If it has other ends, put that file beside its config.json."
            )
            return found

    def shake_hands(self, urls: list[str]):
        """Have each server score the same few rows of random tokens, and compare them."""
        ids = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        length = int(min(16, self.max_length))
        generator = torch.Generator().manual_seed(0)
        rows = torch.tensor(ids)[torch.randint(len(ids), (2, length), generator=generator)]
        top_k = self.args.objective.top_k
        futures = {url: [self.submit(row[:1], row[1:], top_k, url) for row in rows] for url in urls}
        logps = {url: torch.cat([future.result().logps for future in each]) for url, each in futures.items()}
        for url in urls[1:]:
            if (difference := (logps[url] - logps[urls[0]]).abs().mean().item()) > TOLERANCE:
                raise ValueError(
                    f"{urls[0]} and {url} score the same tokens {difference:.2g} nats apart on average, so they don't "
                    f"serve the same model, though both call it {self.model_id}."
                )

    def submit(self, prompt: torch.Tensor, completion: torch.Tensor, top_k: int = 0, url: str | None = None) -> Future:
        """Ask for the [`TokenScores`] of a row of token ids, and go on, see [`Servers.submit`]."""
        ids, top_k = completion.tolist(), min(top_k, self.vocab_size)
        body = {
            "model": self.model_id,
            "prompt": prompt.tolist() + ids,
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 1.0,
        }
        return self.servers.submit(
            "/v1/completions", lambda answer: read_scores(answer, len(prompt), ids, top_k), body, url
        )

    def score(self, prompts, completions, top_k=0, images=None):
        futures = [self.submit(*row, top_k) for row in zip(prompts, completions, strict=True)]
        return [future.result() for future in futures]

    def placed(self):
        return nullcontext()

    def find_image_problem(self, student):
        return "it is behind a URL, where only token ids are sent"

    def release(self):
        pass


def read_models(answer: Any) -> list[dict[str, Any]]:
    """The models that a server lists. Raises a `ValueError` if it lists none."""
    try:
        cards = [card for card in answer["data"] if card["id"]]
    except (KeyError, TypeError):
        cards = []
    if not cards:
        raise ValueError(f"it lists no models, but {str(answer)[:200]}")
    return cards


def find_model(cards: list[dict[str, Any]], model: str | None, url: str) -> dict[str, Any]:
    """The one of a server's models that goes by this name, or of which there is a copy in this folder."""
    for card in cards:
        if model in (None, card["id"], card.get("root")):
            return card
    if Path(str(model)).is_dir():
        return cards[0]
    raise ValueError(
        f"{url} serves {', '.join(card['id'] for card in cards)}, and not {model}. Name one of these as "
        "`teacher_model`, or a folder here with its tokenizer."
    )


def read_scores(answer: Any, start: int, ids: list[int], top_k: int) -> TokenScores:
    """
    The scores of the tokens `ids`, which come after `start` others.

    Raises:
        `ValueError`: unless there is one log-probability for each token, and of the likeliest as many as were asked
        for.
    """
    try:
        (choice,) = answer["choices"]
        entries = choice["prompt_logprobs"]
        if len(entries) != start + len(ids):
            raise ValueError(f"there are entries for {len(entries)} tokens instead of {start + len(ids)}")
        entries = entries[start:]
        logps = [entry[str(id)]["logprob"] for id, entry in zip(ids, entries, strict=True)]
        top = [
            sorted(((each["logprob"], int(id)) for id, each in entry.items()), reverse=True)[:top_k]
            for entry in entries
        ]
        if any(len(named) < top_k for named in top):
            raise ValueError(f"not every token has {top_k} named in its place")
        shape = len(ids), top_k
        scores = TokenScores(
            torch.tensor(logps, dtype=torch.float32),
            torch.tensor([[id for _, id in named] for named in top], dtype=torch.long).view(shape),
            torch.tensor([[logp for logp, _ in named] for named in top], dtype=torch.float32).view(shape),
        )
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the log-probability of a token is missing ({type(error).__name__}: {error})") from error
    for values in (scores.logps, scores.top_logps):
        if not (values.isfinite() & (values <= ROUNDING)).all():
            raise ValueError(
                f"among the log-probabilities is {values[~(values.isfinite() & (values <= ROUNDING))][0]}"
            )
    return scores
