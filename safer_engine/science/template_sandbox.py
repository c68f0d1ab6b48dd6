"""Chat templates rendered as Transformers renders them, in a sandbox that bounds their work and memory.

Before a template is compiled, every step that can cost more than a moment is made to pay for it (see `template_costs`): each
block of statements when it is entered, each value that is written, compared or put together, each filter, test and call. What
can be called is a closed list: a template that uses anything else is refused by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from safer_engine.science import template_costs as costs
from safer_engine.science.template_costs import Budget, TemplateOverrun

_LONGEST_TEMPLATE, _MOST_NODES = 1 << 17, 10_000
"""Characters and syntax nodes of a template: compiling takes the square of them."""
_UNITS, _UNITS_PER_CHARACTER = 10_000_000, 100
_LONGEST_TEXT, _TEXT_PER_CHARACTER = 4_000_000, 8
_FIXED_DATE = (
    ("%-d", "26"), ("%d", "26"), ("%e", "26"), ("%-m", "7"), ("%m", "07"), ("%B", "July"), ("%b", "Jul"), ("%Y", "2024"),
    ("%y", "24"), ("%A", "Friday"), ("%a", "Fri"), ("%j", "208"), ("%H", "00"), ("%M", "00"), ("%S", "00"),
)  # fmt: skip
"""What a template that prints today's date is given: a rendering must not depend on the day."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_BODIES = ("body", "else_")
_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock,
    nodes.With, nodes.Scope, nodes.Assign, nodes.AssignBlock, nodes.ExprStmt, nodes.Break, nodes.Continue,
)  # fmt: skip
_EXPRESSIONS = (
    nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr,
    nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare,
    nodes.Operand, nodes.BinExpr, nodes.UnaryExpr,
)  # fmt: skip


class ChatTemplate:
    """A chat template, ready to write conversations. One thread at a time may use it."""

    def __init__(self, text: str, special_tokens: Mapping[str, Any]) -> None:
        """Compile a template.

        Args:
            special_tokens: `bos_token`, `eos_token`, …, under which the template finds them.

        Raises:
            TemplateError, SyntaxError, RecursionError, ValueError: it is not one, or uses what no chat template needs.
            TemplateOverrun: it is longer than any sensible one.
        """
        if len(text) > _LONGEST_TEMPLATE:
            raise TemplateOverrun(f"is {len(text):,} characters long")
        self._environment = _Environment()
        parsed = self._environment.parse(text)
        if sum(1 for _ in parsed.find_all(nodes.Node)) > _MOST_NODES:
            raise TemplateOverrun("has too many statements")
        self._template = self._environment.from_string(_Charging(self._environment).bounded(parsed))
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, open_turn: bool = False) -> str:
        """A conversation as the template writes it.

        Args:
            open_turn: whether the assistant's next turn is opened.

        Raises:
            TemplateOverrun: it takes more work, or writes more, than any sensible template.
            Exception: whatever else a template can raise.
        """
        chat = [_aliased({name: cell for name, cell in message.items() if cell is not None}) for message in messages]
        length = sum(len(str(cell)) for message in chat for cell in message.values())
        self._environment.budget.left = _UNITS + _UNITS_PER_CHARACTER * length
        text = self._template.render(
            {**self._special_tokens, "messages": chat, "tools": None, "documents": None, "add_generation_prompt": open_turn}
        )
        if len(text) > _LONGEST_TEXT + _TEXT_PER_CHARACTER * length:
            raise TemplateOverrun(f"writes {len(text):,} characters for a conversation of {length:,}")
        return text


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each of the names by which templates look for it."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; here it is a block like any other."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """A namespace that is written as its name: written in full, one that holds others could be endless."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace can't have an attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """`str.format` whose fields are paid for one by one."""

    def __init__(self, environment: _Environment) -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(self._budget.weighed(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        costs.field_width(format_spec)
        return self._budget.weighed(super().format_field(self._budget.weighed(value), format_spec))


class _Generator(CodeGenerator):
    """Calls of the environment's own methods are written plainly, not as calls that a template makes."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        self.visit(node.args[0], frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, with a budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        budget = self.budget = Budget()
        self.charge, self.weighed, self.sized, self.key, self.counted = (
            budget.charge, budget.weighed, budget.sized, budget.key, budget.counted,
        )  # fmt: skip
        self.filters["tojson"] = _to_json
        known = costs.PLAIN_FILTERS | costs.CONSTANT_FILTERS | costs.SHALLOW_FILTERS | costs.FILTER_CHECKS.keys()
        self.filters = {name: self._paid_filter(name, self.filters[name]) for name in known}
        self.tests = {name: self._paid_test(name, test) for name, test in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict_of,
            "cycler": Cycler,
            "joiner": Joiner,
            "namespace": _Namespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self._functions = frozenset(self.globals.values())

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, paid for."""
        costs.combined(self.budget, operator, left, right)
        return self.binop_table[operator](left, right)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` stays as it is found: `call` knows it."""
        return

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """What a template calls, paid for. Raises SecurityError for what is not on the list."""
        if type(__obj) is Macro:
            return __context.call(__obj, *args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        if isinstance(__obj, (FunctionType, type)) and __obj in __self._functions:
            __self.charge(costs.STEP)
            __self.budget.operands(args, named)
            return __obj(*args, **named)
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            return __self._method(__obj, args, named)
        if isinstance(__obj, (Joiner, Undefined)):
            return __obj()
        raise SecurityError(f"a chat template can't call {type(__obj).__name__}")

    def _method(self, method: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        owner, name = method.__self__, method.__name__
        self.charge(costs.STEP)
        self.budget.operands(args, named)
        if isinstance(owner, str) and name in ("format", "format_map"):
            return self._formatted(owner, name, args, named)
        if isinstance(owner, str) and name in costs.TEXT_METHODS:
            self.weighed(owner)
            if name in costs.TEXT_CHECKS:
                costs.TEXT_CHECKS[name](self.budget, owner, *args, **named)
        elif isinstance(owner, (list, tuple)) and name in costs.LIST_METHODS:
            self.sized(owner) if name == "copy" else self.weighed(owner)
        elif isinstance(owner, dict) and name in costs.DICT_METHODS:
            if name == "copy":
                self.sized(owner)
            elif name == "get" and args:
                self.key(args[0])
        elif not (isinstance(owner, (LoopContext, Cycler)) and name in ("cycle", "changed", "next", "reset")):
            raise SecurityError(f"a chat template can't call {type(owner).__name__}.{name}")
        return self.budget.settled(method(*args, **named))

    def _formatted(self, text: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> str:
        if type(text) is not str:
            raise SecurityError(f"a chat template can't call {type(text).__name__}.{name}")
        self.weighed(text)
        return _Formatter(self).vformat(text, () if name == "format_map" else args, args[0] if name == "format_map" else named)

    def _paid_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        check = costs.FILTER_CHECKS.get(name)
        constant, shallow = name in costs.CONSTANT_FILTERS, name in costs.SHALLOW_FILTERS
        budget, skipped = self.budget, 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def paid(*args: Any, **named: Any) -> Any:
            operands = args[skipped:]
            budget.charge(costs.STEP)
            if shallow:
                budget.sized(operands[0])
            elif not constant:
                budget.operands(operands, named)
            costs.looked_up(budget, operands[0], (*operands[1:], *named.values()))
            if check is not None:
                check(budget, *operands, **named)
            return budget.settled(function(*args, **named))

        return paid

    def _paid_test(self, name: str, function: Any) -> Callable[..., Any]:
        shallow, budget = name in costs.SHALLOW_TESTS, self.budget

        @functools.wraps(function)
        def paid(*args: Any, **named: Any) -> Any:
            budget.charge(costs.STEP)
            if not shallow:
                budget.operands(args, named)
            return function(*args, **named)

        return paid


def raise_exception(message: str) -> None:
    """A template's own refusal."""
    raise TemplateError(message)


def strftime_now(format: str) -> str:  # noqa: A002
    """The date on which all templates are rendered."""
    for code, value in _FIXED_DATE:
        format = format.replace(code, value)  # noqa: A001
    return format


def dict_of(*pairs: Any, **named: Any) -> dict[Any, Any]:
    """A mapping that a template makes."""
    return dict(*pairs, **named)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Charging(NodeTransformer):
    """Makes the steps of a parsed template pay for themselves."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def bounded(self, template: nodes.Template) -> nodes.Template:
        """The template with its charges. Raises TemplateError for statements that no chat template needs."""
        bounded = self.visit(template)
        bounded.set_environment(self._environment)
        assert isinstance(bounded, nodes.Template)
        return bounded

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """All nodes come here: those of a closed list, their blocks with a charge at the head."""
        if not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
            raise TemplateError(f"{type(node).__name__.lower()} is not for chat templates (line {node.lineno})")
        blocks = {name: body for name in _BODIES if isinstance(body := getattr(node, name, None), list)}
        prices = {name: sum(map(_price, body)) for name, body in blocks.items() if body or name == "body"}
        node = super().generic_visit(node, *args, **kwargs)
        for name, price in prices.items():
            body = getattr(node, name)
            charge = self._paying("charge", nodes.Const(costs.STEP + price, lineno=node.lineno))
            setattr(node, name, [nodes.ExprStmt(charge, lineno=node.lineno), *body])
        return node

    def _visit_call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._paying("sized", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = self._paying("sized", node.dyn_kwargs)
        return node

    visit_Call = visit_Filter = visit_Test = _visit_call

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError(f"a recursive loop is not for chat templates (line {node.lineno})")
        self.generic_visit(node)
        if node.test is not None:
            node.iter = self._paying("counted", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [child if isinstance(child, nodes.TemplateData) else self._paying("weighed", child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._weighed(child) for child in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._weighed(node.expr)
        for operand in node.ops:
            operand.expr = self._weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._paying("sized", node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = self._paying("key", node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._paying("key", node.key)
        return node

    def _weighed(self, node: nodes.Expr) -> nodes.Expr:
        """Constants need no paying for: they are no longer than the template."""
        return node if isinstance(node, nodes.Const) else self._paying("weighed", node)

    def _paying(self, method: str, operand: nodes.Node) -> nodes.Call:
        target = nodes.EnvironmentAttribute(method, lineno=operand.lineno)
        return nodes.Call(target, [operand], [], None, None, lineno=operand.lineno)


def _price(node: nodes.Node) -> int:
    """Steps of a statement without those of the blocks in it, and the characters it writes itself."""
    own = len(node.data) if isinstance(node, nodes.TemplateData) else 0
    inner = {id(child) for name in _BODIES for child in getattr(node, name, None) or []}
    return 1 + own + sum(_price(child) for child in node.iter_child_nodes() if id(child) not in inner)
