"""Walk through a PyTorch file's pickle without building anything, and refuse what would end badly.

torch.load(weights_only=True) runs no code from a file, but trusts its sizes. The walk keeps a stack of numbers,
texts and tuples of these; everything else becomes one placeholder.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flashvaed_cli.errors import TensorFileError
from flashvaed_cli.limits import MAX_PICKLE_STEPS, MAX_TUPLE_DEPTH

_REFUSED_NAMES = {
    "builtins bytearray": "a byte array",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_wrapper_subclass": "a tensor without data",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor without data",
}
_ELEMENT_BYTES = {
    "Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2,
    "Short": 2,
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


@dataclass(frozen=True)
class _Tuple:
    items: tuple[object, ...]
    depth: int


@dataclass(frozen=True)
class _Global:
    name: str


def scan_pickle(file: BinaryIO, path: Path, record_bytes: Mapping[str, int] | int) -> None:
    """Check the pickle that starts at the file's position, to its end.

    Args:
        path: for errors.
        record_bytes: size of the data behind each storage key; a single number is the size of all together.
    Raises:
        TensorFileError: too long, nested too deep, a storage larger than its data, or non-dense tensors.
        ValueError: not a pickle.
    """
    _Scan(path, record_bytes).run(file)


class _Scan:
    def __init__(self, path: Path, record_bytes: Mapping[str, int] | int) -> None:
        self.path, self.record_bytes = path, record_bytes
        self.stack: list[object] = []
        self.memo: dict[object, object] = {}

    def run(self, file: BinaryIO) -> None:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step >= MAX_PICKLE_STEPS:
                raise TensorFileError(
                    f"{self.path}: its pickle takes more than {MAX_PICKLE_STEPS} steps: not a file of weights. "
                    "Save the VAE's state dict alone."
                )
            try:
                self._take(opcode, argument)
            except (IndexError, KeyError):
                raise ValueError("a damaged pickle") from None

    def _take(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        name, stack = opcode.name, self.stack
        if name in _PUTS:
            self.memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name == "TUPLE":
            self._push_tuple(self._pop_to_mark())
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._push_tuple([stack.pop() for _ in range(count)][::-1])
        elif name == "MARK":
            stack.append(pickletools.markobject)
        elif name == "GLOBAL":
            if (what := _REFUSED_NAMES.get(str(argument))) is not None:
                raise TensorFileError(f"{self.path}: holds {what}; only plain dense tensors are read. Save it as one.")
            stack.append(_Global(str(argument)))
        elif name == "BINPERSID":
            self._check_storage(stack.pop())
            stack.append(None)
        else:
            self._take_other(opcode, argument)

    def _take_other(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        if pickletools.markobject in opcode.stack_before:
            self._pop_to_mark()
            # The item before the mark is changed in place, or (in a pickle of lists) the mark opens it.
            for _ in opcode.stack_before[: opcode.stack_before.index(pickletools.markobject)]:
                self.stack.pop()
        else:
            for _ in opcode.stack_before:
                self.stack.pop()
        plain = argument if isinstance(argument, int | str) and not opcode.stack_before else None
        self.stack += [plain for _ in opcode.stack_after]

    def _pop_to_mark(self) -> list[object]:
        items = []
        while (item := self.stack.pop()) is not pickletools.markobject:
            items.append(item)
        return items[::-1]

    def _push_tuple(self, items: list[object]) -> None:
        depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
        if depth > MAX_TUPLE_DEPTH:
            raise TensorFileError(
                f"{self.path}: tuples nested deeper than {MAX_TUPLE_DEPTH}: not a file of weights. "
                "Save the VAE's state dict alone."
            )
        # Long tuples are not shapes that this walk needs.
        self.stack.append(_Tuple(tuple(items[:8]), depth))

    def _check_storage(self, reference: object) -> None:
        """`("storage", type, key, device, elements, ...)`: check that it has as many bytes as it says."""
        if not isinstance(reference, _Tuple) or len(reference.items) < 5:
            raise ValueError("a damaged pickle")
        _, kind, key, _, elements = reference.items[:5]
        if not isinstance(elements, int) or elements < 0:
            raise ValueError("a damaged pickle")
        kind_name = kind.name.rpartition(" ")[2].removesuffix("Storage") if isinstance(kind, _Global) else ""
        num_bytes = elements * _ELEMENT_BYTES.get(kind_name, 1)
        there = self.record_bytes if isinstance(self.record_bytes, int) else self.record_bytes.get(str(key), 0)
        if num_bytes > there:
            raise TensorFileError(
                f"{self.path}: damaged or truncated: storage {key!s:.40} takes {num_bytes} bytes of {there}. "
                "Copy or download it again."
            )
