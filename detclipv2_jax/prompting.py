"""How a model is asked for names: bare, or with definitions as in its training.

Both a training run, from its dictionary, and a checkpoint, which carries the definitions, make a
`Prompting`; what it asks for a name does not depend on where it comes from.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from detclipv2_jax.data.concepts import TEMPLATE, fitted, normalise
from detclipv2_jax.data.definitions import define
from detclipv2_jax.predictor import Predictor, Texts, check_names

Definitions = Literal["as_trained", "on", "off"]
CHOICES: tuple[Definitions, ...] = ("as_trained", "on", "off")


@dataclasses.dataclass(frozen=True)
class Prompting:
    """What stands for a name: the name alone, or, if `enabled`, with its definition.

    dictionary: normalised name → definition, of the run that trained the model.
    """

    enabled: bool = False
    dictionary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = TEMPLATE

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
        if not self.enabled:
            return predictor.encode(names)
        check_names(names)
        given = given or [(None, None)] * len(names)
        own = {normalise(name): text for name, (text, _) in zip(names, given) if text}
        synsets = {
            normalise(name): synset
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
        if not self.enabled:
            return {"definitions": False}
        bare = zip(map(normalise, texts.names), texts.prompts)
        defined = sum(name != prompt for name, prompt in bare)
        return {"definitions": True, "template": self.template, "names_defined": defined}


def prompting(
    config: Mapping[str, Any],
    definitions: Mapping[str, str],
    choice: Definitions | None = None,
) -> Prompting:
    """From a run's config (a nested dict) and the definitions that it trained with.

    `choice` is 'on', 'off' or 'as_trained'; None: as the config says.
    """
    choice = choice or config["eval"].get("definitions", "as_trained")
    data = config.get("data", {})
    return Prompting(
        enabled=bool(definitions) if choice == "as_trained" else choice == "on",
        dictionary=definitions,
        template=data.get("template", TEMPLATE),
    )
