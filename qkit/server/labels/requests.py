"""Requests to a model with labels, in the form of vLLM's /classify: `input` is a text, token ids, or a list of either.

Beyond vLLM, an input may be a mapping with the fields of the task (`{"text": ..., "pair": ...}`), and a request may have these fields in place
of `input`. Options of the task stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkit.plugins.task import Service
from qkit.server.refusal import Refused

INPUT, IDS = "input", "input_ids"
# Parameters of vLLM's pooling requests that never change an answer, and values of others that do not.
IDLE = frozenset({"user", "request_id", "cache_salt"})
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "priority": (0,),
    "padding": ("do_not_pad",),
    "truncation_side": ("right",),
    "mm_processor_kwargs": ({},),
    "encoding_format": ("float",),
}
OLD_NAMES = {"activation": "use_activation"}  # of vLLM up to 0.11


def requests_of(body: Any, service: Service, served: str) -> list[dict[str, Any]]:
    """The requests to a service that are in the body of one to the server, each with its options.

    Raises:
        Refused: the body names another model, or has a parameter that this server does not know, or no input.
    """
    if not isinstance(body, dict):
        raise Refused('the body must be a JSON object, such as {"input": "a text"}')
    given: dict[str, Any] = {
        OLD_NAMES.get(str(name), str(name)): value for name, value in body.items() if value is not None
    }
    if given.pop("model", served) != served:
        raise Refused(f"the model `{body['model']}` does not exist; this server has `{served}`", "model", 404)
    options = {name: given.pop(name) for name in service.OPTIONS if name in given}
    fields = {name: given.pop(name) for name in service.FIELDS if name in given}
    inputs = given.pop(INPUT, None)
    _refuse_unknown(given, service)
    if (inputs is None) == (not fields):
        forms = f"`{INPUT}`, or its fields ({', '.join(f'`{name}`' for name in service.FIELDS)})"
        raise Refused(f"a request must have either {forms}", INPUT)
    return [{**options, **one} for one in ([fields] if fields else _inputs(inputs, service))]


def _refuse_unknown(given: Mapping[str, Any], service: Service) -> None:
    for name, value in given.items():
        if name == "messages":
            raise Refused(f"`messages`: this model reads texts, not conversations; send `{INPUT}`", "messages")
        if name not in IDLE and value not in NEUTRAL.get(name, (False,)):
            known = ", ".join((INPUT, *service.FIELDS, *sorted(service.OPTIONS)))
            raise Refused(f"`{name}` is not supported by this server; it knows {known}", name)


def _inputs(inputs: Any, service: Service) -> list[dict[str, Any]]:
    """Each of the inputs as the fields of a request."""
    if not isinstance(inputs, list) or (inputs and all(type(number) is int for number in inputs)):
        inputs = [inputs]
    if not inputs:
        raise Refused(f"`{INPUT}` is an empty list", INPUT)
    return [_fields(one, f"{INPUT}[{number}]", service) for number, one in enumerate(inputs)]


def _fields(one: Any, where: str, service: Service) -> dict[str, Any]:
    if isinstance(one, str):
        return {service.FIELDS[0]: one}
    if isinstance(one, list) and all(type(number) is int for number in one):
        return {IDS: one}
    if isinstance(one, dict) and one.keys() <= {*service.FIELDS}:
        return {name: value for name, value in one.items() if value is not None}
    names = ", ".join(service.FIELDS)
    raise Refused(f"`{where}` must be a text, a list of token ids, or an object with the keys {names}", INPUT)
