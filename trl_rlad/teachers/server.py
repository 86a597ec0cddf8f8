"""A teacher behind a URL: a model that vLLM or SGLang serves."""

import os
from concurrent.futures import Future
from contextlib import nullcontext
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..config import RLADConfig
from .client import WHICH_SERVERS, Request, Servers, UnfitServerError
from .contract import find_ends
from .loading import HUB_KWARGS, load_processing_class
from .teacher import TokenScores


logger = get_logger(__name__)

KEY = "VLLM_API_KEY"  # the environment variable from which vLLM's server takes it too
# Mean difference in nats between two servers of one model: some hundredths in bfloat16, whole nats for two models
TOLERANCE = 0.1
ROUNDING = 1e-3  # by which a log-probability may be above 0
MASS_ROUNDING = 1e-2  # by which probabilities may sum to more or less than 1
SGLANG = "sglang"  # as whose its server lists its models
MODE = "It must be served with `--logprobs-mode raw_logprobs`, vLLM's default."
NAMED = 20  # tokens in each place to be named before training: the most by vLLM's default


class ServedTeacher:
    """
    A [`Teacher`] behind the server of vLLM or SGLang, at temperature 1, as none is applied to prompts there.

    It is sent the token ids of a prompt with its completion, and returns the log-probabilities of all of them or an
    error. Before training, all servers must be ready, serve the same model, and return for a row of random tokens what
    can be log-probabilities, the same from each. While it lasts they are asked for that row again, see [`Servers`],
    and must return what they did.

    Args:
        urls (`list[str]`):
            Addresses of servers of one model.
        model (`str`, *optional*):
            Its name on the servers; or a name or path that has its tokenizer. `None` takes the first that is served.
        args ([`RLADConfig`]):
            Says how long to wait, and how many tokens are to be named.

    Raises:
        `ValueError`: if the servers don't serve the model or the same, can't be asked, or no tokenizer is found.
        [`ServerError`]: if one isn't ready within half of `teacher_timeout`, or its answers are wrong.
    """

    is_sharded = shares_prompts = False
    is_frozen = mixes_rows = True
    length_remedy = "serve it with a higher `--max-model-len`"

    def __init__(self, urls: list[str], model: str | None, args: RLADConfig):
        self.args = args
        key = (os.environ.get(KEY) or "").strip() or None
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"The environment variable `{KEY}` has characters in it that can't be sent in a header.")
        self.model_in_answers: str | None = None
        models = Request("/v1/models", read_models)
        self.servers = Servers(urls, args.teacher_timeout / 2, models, key)
        try:
            lists = [self.servers.submit(models, url) for url in urls]
            self.connect(urls, model, [each.result() for each in lists])
        except ValueError as error:  # it might quote the key
            raise ValueError(self.servers.redact(str(error))) from None
        finally:
            self.servers.close()

    def connect(self, urls: list[str], model: str | None, lists: list[list["Card"]]):
        """Find the model in what the servers list, and see whether they serve it."""
        cards = [find_model(each, model, url) for each, url in zip(lists, urls, strict=True)]
        self.model_id = cards[0].id
        if others := {card.id for card in cards} - {self.model_id}:
            raise ValueError(
                f"The servers {', '.join(urls)} serve different models: {', '.join([self.model_id, *others])}. URLs "
                "in a list are of one teacher; for several, pass `teacher_server_urls` as a dictionary of them by "
                "name."
            )
        self.is_sglang = cards[0].owner == SGLANG
        if len({card.owner == SGLANG for card in cards}) == 2:
            raise ValueError(f"Of the servers {', '.join(urls)} some are SGLang's. URLs in a list are of one kind.")
        if self.is_sglang and cards[0].parent:
            raise ValueError(f"{self.model_id} is an adapter, which only vLLM can serve as a teacher: merge it.")
        # Less one, as vLLM always generates a token
        self.max_length = min(card.max_model_len for card in cards) - 1
        root = cards[0].root or self.model_id
        self.name = self.servers.redact(Path(root).name if Path(root).is_absolute() else root)
        places = [model, root, cards[0].parent, cards[0].base, self.model_id]
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
        """Have each server score the same row of random tokens, compare them, and have them do it again ever after."""
        ids = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        generator = torch.Generator().manual_seed(0)
        row = torch.tensor(ids)[torch.randint(len(ids), (int(min(32, self.max_length)),), generator=generator)]
        request = self.ask_for(row[:1], row[1:], max(self.args.objective.top_k, NAMED))
        futures = [self.servers.submit(request, url) for url in urls]
        first, *others = [future.result().logps for future in futures]
        for url, logps in zip(urls[1:], others, strict=True):
            if (difference := (logps - first).abs().mean().item()) > TOLERANCE:
                raise ValueError(
                    f"{urls[0]} and {url} score the same tokens {difference:.2g} nats apart on average, so they don't "
                    f"serve the same model, though both call it {self.model_id}."
                )

        def read(answer):
            if (difference := (request.read(answer).logps - first).abs().mean().item()) > TOLERANCE:
                raise UnfitServerError(
                    f"scores the same tokens {difference:.2g} nats apart from before on average, so it doesn't serve "
                    "the model with which training began."
                )

        self.servers.check = request._replace(read=read)

    def ask_for(self, prompt: torch.Tensor, completion: torch.Tensor, top_k: int = 0) -> Request:
        """What to send for the [`TokenScores`] of a row of token ids."""
        ids, top_k, start = completion.tolist(), min(top_k, self.vocab_size), len(prompt)
        body: dict[str, Any]
        if self.is_sglang:
            path, body = "/generate", {"input_ids": prompt.tolist() + ids, "sampling_params": {"max_new_tokens": 0}}
            body |= {"return_logprob": True, "logprob_start_len": start - 1, "top_logprobs_num": top_k}
        else:
            path, body = "/v1/completions", {"model": self.model_id, "prompt": prompt.tolist() + ids}
            body |= {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": 1.0}

        def read(answer):
            if self.is_sglang:
                return read_scores(read_sglang(answer), ids, top_k, self.vocab_size)
            name = answer.get("model")
            self.model_in_answers = self.model_in_answers or name
            if name != self.model_in_answers:
                raise UnfitServerError(f"answers as {name!r} instead of {self.model_in_answers!r}")
            return read_scores(read_vllm(answer, start, ids), ids, top_k, self.vocab_size)

        # An entry has about 80 bytes
        return Request(path, read, body, 2**20 + 1000 * (start + len(ids)) * (top_k + 1))

    def submit(self, prompt: torch.Tensor, completion: torch.Tensor, top_k: int = 0, url: str | None = None) -> Future:
        """Ask for the [`TokenScores`] of a row of token ids, and go on, see [`Servers.submit`]."""
        return self.servers.submit(self.ask_for(prompt, completion, top_k), url)

    def score(self, prompts, completions, top_k=0, images=None):
        futures = [self.submit(*row, top_k) for row in zip(prompts, completions, strict=True)]
        return [future.result() for future in futures]

    def placed(self):
        return nullcontext()

    def find_image_problem(self, student):
        return "it is behind a URL, where only token ids are sent, and would have to be loaded here"

    def release(self):
        self.servers.close()


class Card(NamedTuple):
    """A model that a server lists. Of an adapter `parent` and `base` are the name and the place of its base. The
    `owner` tells the server's kind."""

    id: str
    root: str | None
    parent: str | None
    base: str | None
    max_model_len: float
    owner: Any


def read_models(answer: Any) -> list[Card]:
    """The models that a server lists. Raises an [`UnfitServerError`] if it lists none."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UnfitServerError("lists no models")
    by_id = {str(entry.get("id")): entry for entry in entries}
    cards = []
    for entry in entries:
        base = by_id.get(str(entry.get("parent"))) or {}  # which knows the length
        length = entry.get("max_model_len") or base.get("max_model_len") or float("inf")
        names = entry.get("id"), entry.get("root"), entry.get("parent"), base.get("root")
        if not isinstance(names[0], str) or not all(isinstance(name, str | None) for name in names):
            raise UnfitServerError(f"lists a model whose id, root and parent are {names[:3]}, and not text")
        if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 2:
            raise UnfitServerError(f"lists {names[0]} with a `max_model_len` of {length!r}")
        cards.append(Card(*names, length, entry.get("owned_by")))
    return cards


def find_model(cards: list[Card], model: str | None, url: str) -> Card:
    """The one of a server's models that goes by this name, or of which there is a copy in this folder."""
    for card in cards:
        if model in (None, card.id, card.root):
            return card
    if Path(str(model)).is_dir():
        return cards[0]
    raise ValueError(
        f"{url} serves {', '.join(card.id for card in cards)}, and not {model}. Name one of these as "
        "`teacher_model`, or a folder here with its tokenizer."
    )


def read_vllm(answer: Any, start: int, ids: list[int]) -> list[dict[str, Any]]:
    """Log-probabilities by token, at each of the tokens `ids`, which come after `start` others."""
    (choice,) = answer["choices"]
    if (entries := choice.get("prompt_logprobs")) is None:
        raise UnfitServerError(f"gave an answer without `prompt_logprobs`. {WHICH_SERVERS}")
    if len(entries) != start + len(ids):
        raise ValueError(f"there are entries for {len(entries)} tokens instead of {start + len(ids)}")
    return [{key: value["logprob"] for key, value in entry.items()} for entry in entries[start:]]


def read_sglang(answer: Any) -> list[dict[str, Any]]:
    """The same of SGLang, whose lists begin with the token before, of which it says nothing."""
    scores = answer["meta_info"]
    sampled, named = scores["input_token_logprobs"][1:], scores.get("input_top_logprobs") or []
    entries = [[each, *(top or [])] for each, top in zip_longest(sampled, named[1:])]
    return [{str(id): logp for logp, id, *_ in entry} for entry in entries]


def read_scores(entries: list[dict[str, Any]], ids: list[int], top_k: int, vocab_size: int) -> TokenScores:
    """
    The scores of the tokens `ids`, from log-probabilities by token at each.

    Raises:
        [`UnfitServerError`]: if they can't be log-probabilities of this vocabulary.
        `Exception`: unless there is one log-probability for each token, and of the likeliest as many as were asked
            for, of which there can be a distribution over the vocabulary.
    """
    logps, named = [], []
    for id, entry in zip(ids, entries, strict=True):
        by_id = {read_id(key, vocab_size): read_logp(logp) for key, logp in entry.items()}
        if id not in by_id:
            raise ValueError(f"the log-probability of the token {id} is missing")
        if len(by_id) < top_k:
            raise ValueError(f"{len(by_id)} tokens are named in the place of one, and not {top_k}")
        logps.append(by_id[id])
        named.append(sorted(((logp, id) for id, logp in by_id.items()), reverse=True)[:top_k])
    shape = len(ids), top_k
    top_ids = torch.tensor([[id for _, id in each] for each in named], dtype=torch.long).view(shape)
    top_logps = torch.tensor([[logp for logp, _ in each] for each in named], dtype=torch.float32).view(shape)
    if top_logps.numel():
        # All others have at most as much as the last one that is named
        mass, rest = top_logps.exp().sum(-1), (vocab_size - top_k) * top_logps[:, -1].exp()
        if mass.max() > 1 + MASS_ROUNDING or (mass + rest).min() < 1 - MASS_ROUNDING:
            raise UnfitServerError(f"gave what can't be log-probabilities, as they don't sum to 1. {MODE}")
    return TokenScores(torch.tensor(logps, dtype=torch.float32), top_ids, top_logps)


def read_id(key: str, vocab_size: int) -> int:
    if str(id := int(key)) != key or id < 0:
        raise ValueError(f"{key!r} is no token's id")
    if id >= vocab_size:
        raise UnfitServerError(
            f"names the token {id}, beyond the vocabulary of {vocab_size}. If that isn't the served model's, name a "
            "folder with its own config.json as `teacher_model`"
        )
    return id


def read_logp(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"among the log-probabilities is {value!r}")
    if value > ROUNDING:
        raise UnfitServerError(f"gave {value} as a log-probability. {MODE}")
    return float(value)
