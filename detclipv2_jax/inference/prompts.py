"""Prompts: the text that stands for a name when the model is asked for it.

A prompt is the bare name, the name with its definition (as in training), or one or more sentences.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import Definitions, DetectConfig
from detclipv2_jax.inference.names import check_names
from detclipv2_jax.inference.predictor import EncodedNames, Predictor
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.definitions import Knowledge, define
from detclipv2_jax.text.tokenizer import CONTEXT, TEMPLATE, fitted, kept, normalize


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Turns names into prompts and has them encoded.

    The same settings give the same prompts in training, where the definitions come from the
    dictionary of the data, and for a checkpoint, which stores them.

    Attributes:
      with_definitions: whether a prompt is the name with its definition.
      dictionary: normalized name -> definition, from the run that trained the model; "" for names
        that it trained bare.
      template: joins {name} and {definition}.
      sentences: prompts such as 'a photo of a {}.'; the mean of their embeddings stands for the
        name. They exclude `with_definitions`.
    """

    with_definitions: bool = False
    dictionary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = TEMPLATE
    sentences: tuple[str, ...] = ()

    def __post_init__(self):
        for sentence in self.sentences:
            _check_sentence(sentence)
        if self.with_definitions and self.sentences:
            raise UserError(
                "names can be given with their definitions or in sentences (prompts), not both. "
                "Leave one of them out."
            )

    @classmethod
    def for_model(
        cls,
        config: DetectConfig,
        definitions: Mapping[str, str],
        template: str = TEMPLATE,
        choice: Definitions | None = None,
        sentences: Sequence[str] | None = None,
    ) -> "Prompter":
        """Return the prompter of a trained model.

        Args:
          config: the model's settings.
          definitions: normalized name -> definition that the model trained with; empty if it
            trained with bare names.
          template: joins {name} and {definition}, as in training.
          choice: 'on', 'off' or 'as_trained'. None: `config.definitions`.
          sentences: replace `config.prompts`. None: `config.prompts`, or no sentences if `choice`
            is 'on'. With sentences, 'as_trained' means without definitions.

        Raises:
          UserError: a sentence does not contain {}, or there are sentences and definitions 'on'.
        """
        if sentences is None:
            sentences = () if choice == "on" else config.prompts
        choice = choice or ("as_trained" if sentences else config.definitions)
        trained_with_definitions = bool(definitions) and not sentences
        return cls(
            with_definitions=trained_with_definitions if choice == "as_trained" else choice == "on",
            dictionary=definitions,
            template=template,
            sentences=tuple(sentences),
        )

    def encode(
        self,
        predictor: Predictor,
        names: Sequence[str],
        given: Sequence[tuple[str | None, str | None]] | None = None,
    ) -> EncodedNames:
        """Return the names, encoded by the predictor's model.

        With definitions, a name that neither the dictionary nor WordNet knows gets the definition
        of the most similar name in the dictionary, compared by the model's own text tower, if one
        is near; else it stays bare (`definitions.define`).

        Args:
          predictor: encodes the prompts.
          names: what to look for.
          given: (definition, synset) of each name as the dataset gives them, or None; they are
            preferred to all others, as in training.

        Raises:
          UserError: there are no names, or a name is empty.
        """
        check_names(names)
        if self.sentences:
            prompts = [[normalize(text.format(name)) for text in self.sentences] for name in names]
            _check_room(self.sentences, prompts)
            return predictor.encode(names, prompts)
        if not self.with_definitions:
            return predictor.encode(names)
        own: dict[str, Meaning] = {}
        for name, (definition, synset) in zip(names, given or ()):
            own.setdefault(normalize(name), Meaning(definition, synset))
        found = define(
            names,
            Knowledge(own=own, dictionary=self.dictionary),
            embed=lambda texts: predictor.encode(texts).embeddings[: len(texts)],
        )
        prompts = fitted(names, [definition.text for definition in found], self.template)
        return predictor.encode(names, prompts)

    def dictionary_prompts(self) -> dict[str, str]:
        """Return name -> prompt for every name of the dictionary; empty without definitions."""
        if not self.with_definitions:
            return {}
        names = list(self.dictionary)
        return dict(zip(names, fitted(names, list(self.dictionary.values()), self.template)))

    def settings(self, encoded: EncodedNames) -> dict[str, Any]:
        """Return what a results file records about the prompts of `encoded`."""
        cut = {"names_cut": sum(encoded.is_cut)} if any(encoded.is_cut) else {}
        if self.sentences:
            return {"definitions": False, "prompts": list(self.sentences), **cut}
        if not self.with_definitions:
            return {"definitions": False, **cut}
        bare = zip(map(normalize, encoded.names), encoded.prompts)
        defined = sum(not name.startswith(prompt) for name, prompt in bare)  # bare ones may be cut
        return {"definitions": True, "template": self.template, "names_defined": defined, **cut}


def _check_room(sentences: Sequence[str], prompts: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` if a sentence is so long that the model reads nothing of a name."""
    for number, sentence in enumerate(sentences):
        before = normalize(sentence.partition("{")[0])
        for text in kept([row[number] for row in prompts]):
            if len(text) <= len(before):
                raise UserError(
                    f"the prompt {sentence!r} has {CONTEXT - 2} or more tokens before the name, "
                    "and the model reads no more. Shorten it."
                )


def _check_sentence(sentence: str) -> None:
    try:
        fields = [part[1:] for part in string.Formatter().parse(sentence) if part[1] is not None]
    except ValueError:
        fields = []  # an unmatched brace
    if fields != [("", "", None)]:
        raise UserError(
            f"the prompt {sentence!r} must contain {{}} exactly once, where the name goes. Write "
            "for example 'a photo of a {}.'."
        )
