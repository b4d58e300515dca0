"""How a model is asked for names: bare, with definitions as in its training, or in sentences.

Both a training run, from its dictionary, and a checkpoint, which carries the definitions, make a
`Prompting`; what it asks for a name does not depend on where it comes from.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import Definitions, DetectConfig
from detclipv2_jax.inference.predictor import Predictor, Texts, check_names, prompt
from detclipv2_jax.text.definitions import define
from detclipv2_jax.text.tokenizer import TEMPLATE, fitted, normalize


@dataclasses.dataclass(frozen=True)
class Prompting:
    """What stands for a name: the name alone, or, if `enabled`, with its definition, or sentences.

    dictionary: normalized name → definition, of the run that trained the model.
    sentences: an ensemble, as 'a photo of a {}.': the mean of their embeddings stands for the name.
    """

    enabled: bool = False
    dictionary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = TEMPLATE
    sentences: tuple[str, ...] = ()

    def __post_init__(self):
        for sentence in self.sentences:
            _check_sentence(sentence)
        if self.enabled and self.sentences:
            raise UserError(
                "names are asked with their definitions or in sentences (prompts), not both; "
                "leave one of them out."
            )

    def encode(
        self,
        predictor: Predictor,
        names: Sequence[str],
        given: Sequence[tuple[str | None, str | None]] | None = None,
    ) -> Texts:
        """The names, encoded by the predictor's model.

        `given`: (definition, synset) of each name, as far as its data set tells; they come first. A
        name that neither the dictionary nor WordNet knows borrows the definition of the concept in
        the dictionary that is nearest to it for the model's own text tower.
        """
        check_names(names)
        if self.sentences:
            asked = [[prompt(text.format(name)) for text in self.sentences] for name in names]
            return predictor.encode(names, asked)
        if not self.enabled:
            return predictor.encode(names)
        given = given or [(None, None)] * len(names)
        own = {normalize(name): text for name, (text, _) in zip(names, given) if text}
        synsets = {
            normalize(name): synset
            for name, (text, synset) in zip(names, given)
            if synset and not text
        }
        found = define(
            names,
            synsets=synsets,
            dictionary={**self.dictionary, **own},
            embed=lambda texts: predictor.encode(texts).embeddings[: len(texts)],
        )
        prompts = fitted(names, [definition.text for definition in found], self.template)
        return predictor.encode(names, prompts)

    def known(self) -> dict[str, str]:
        """The texts that stand for the dictionary's names: name → name with its definition."""
        if not self.enabled:
            return {}
        names = list(self.dictionary)
        return dict(zip(names, fitted(names, list(self.dictionary.values()), self.template)))

    def settings(self, texts: Texts) -> dict[str, Any]:
        """What an evaluation's results tell of it."""
        if self.sentences:
            return {"definitions": False, "prompts": list(self.sentences)}
        if not self.enabled:
            return {"definitions": False}
        bare = zip(map(normalize, texts.names), texts.prompts)
        defined = sum(name != prompt for name, prompt in bare)
        return {"definitions": True, "template": self.template, "names_defined": defined}


def prompting(
    config: DetectConfig,
    definitions: Mapping[str, str],
    template: str = TEMPLATE,
    choice: Definitions | None = None,
    sentences: Sequence[str] | None = None,
) -> Prompting:
    """Return how a model is asked, from its config and the definitions that it trained with.

    `choice` is 'on', 'off' or 'as_trained'; None: as the config says. `sentences` likewise. With
    sentences, a model that trained with definitions is asked without them.

    Raises:
      UserError: a sentence without {}, or sentences and definitions 'on'.
    """
    if sentences is None:
        sentences = () if choice == "on" else config.prompts
    choice = choice or ("as_trained" if sentences else config.definitions)
    as_trained = bool(definitions) and not sentences
    return Prompting(
        enabled=as_trained if choice == "as_trained" else choice == "on",
        dictionary=definitions,
        template=template,
        sentences=tuple(sentences),
    )


def _check_sentence(sentence: str) -> None:
    try:
        fields = [part[1:] for part in string.Formatter().parse(sentence) if part[1] is not None]
    except ValueError:
        fields = []  # a bracket alone
    if fields != [("", "", None)]:
        raise UserError(
            f"the prompt {sentence!r} must hold {{}} once, where the name goes, as 'a photo of a "
            "{}.' does."
        )
