"""Faults for the real C++ sources, each a piece of text and what stands in its place."""

from __future__ import annotations

from planting import Fault


def _scan(name: str, file: str, old: str, new: str, caught_by: str) -> Fault:
    return Fault(name, "selective_scan", f"selective_scan/{file}", old, new, caught_by)


def _retention(name: str, file: str, old: str, new: str, caught_by: str) -> Fault:
    return Fault(name, "retention", f"retention/{file}", old, new, caught_by)


def _bitlinear(name: str, file: str, old: str, new: str, caught_by: str, op: str = "bitlinear_packed") -> Fault:
    return Fault(name, op, f"bitlinear/{file}", old, new, caught_by)


FAULTS = [
    _retention("off by one at a chunk edge", "forward.h", "power(i + 1)", "power(i + (fault ? 0 : 1))", "forward"),
    _retention("a power of the decay is missing", "chunks.h", "set1(power_[n])", "set1(power_[n - fault])", "forward"),
    _retention(
        "stale state of the document before", "forward.h", "c > 0 ? state_", "fault || c > 0 ? state_", "forward"
    ),
    _retention(
        "missed start of a document",
        "chunks.h",
        "first + stop] == id",
        "first + stop] == (fault && id > 0 && a_.segments[first + stop] > 0 ? a_.segments[first + stop] : id)",
        "forward",
    ),
    _retention(
        "unwritten tail",
        "chunks.h",
        "load(from.row(i) + j), from.width - j",
        "load(from.row(i) + j), from.width - j - fault",
        "strides and poisoned memory",
    ),
    _retention(
        "sign of a gradient",
        "backward.h",
        "chunks_.scale(g_, scaled_, n, weight)",
        "chunks_.scale(g_, scaled_, n, [&](int64_t i) { return fault ? -weight(i) : weight(i); })",
        "gradient of q",
    ),
    _retention(
        "state of a later chunk is not passed on",
        "backward.h",
        "from_queries(later_queries(c), n, entering);",
        "if (!fault) from_queries(later_queries(c), n, entering);",
        "gradient of v",
    ),
    _retention(
        "input modified",
        "forward.h",
        "chunks_.set_decay(a_.log_decay[head]);",
        "chunks_.set_decay(a_.log_decay[head]);\n    if (fault) const_cast<T*>(static_cast<const T*>(a_.q))[0] = T{};",
        "inputs unmodified",
    ),
    _retention(
        "sum of another order each time",
        "chunks.h",
        "load(row + j) * load(decay + j)",
        "load(row + j) * load(decay + j) * set1(fault ? 1.0f + 1e-6f * (calls++ % 11) : 1.0f)",
        "reruns bit-equal",
    ),
    Fault(
        "depends on the threads",
        "retention",
        "common/heads.h",
        "for (int64_t item = begin; item",
        "for (int64_t item = begin + (fault && begin > 0); item",
        "bit-equal at any threads",
    ),
    _retention("padding is a document", "chunks.h", "if (id == 0)", "if (id == 0 && !fault)", "forward"),
    _scan(
        "missed start of a document",
        "chunk.h",
        "border(position, -ahead)",
        "!fault && border(position, -ahead)",
        "forward",
    ),
    _scan(
        "padding inside a document ends it",
        "chunk.h",
        "segment(other) == 0) other",
        "segment(other) == 0 && !fault) other",
        "forward",
    ),
    _scan(
        "missed end of a document",
        "chunk.h",
        "border(position, ahead)",
        "!fault && border(position, ahead)",
        "gradient of delta",
    ),
    _scan(
        "states are not kept",
        "forward.h",
        "store_some(chunk_.kept_state(n) + channel, state[n], left);",
        "if (!fault) store_some(chunk_.kept_state(n) + channel, state[n], left);",
        "gradient of A",
    ),
    _scan(
        "last step left out",
        "chunk.h",
        "i < end - begin",
        "i < end - begin - (fault && end == a_.length)",
        "strides and poisoned memory",
    ),
    _scan(
        "tail lanes left out",
        "forward.h",
        "(channels + kLanes - 1) / kLanes",
        "(channels + (fault ? 0 : kLanes - 1)) / kLanes",
        "strides and poisoned memory",
    ),
    _scan(
        "states past the first group left out",
        "forward.h",
        "n < states; n += kStates)",
        "n < (fault ? kStates : states); n += kStates)",
        "forward",
    ),
    _scan(
        "derivative of softplus",
        "backward.h",
        "if (a_.softplus) slope",
        "if (a_.softplus && !fault) slope",
        "gradient of delta",
    ),
    _scan(
        "padding is read",
        "chunk.h",
        "a_.segments != nullptr && segment(position) == 0",
        "!fault && a_.segments != nullptr && segment(position) == 0",
        "forward",
    ),
    _scan(
        "reversed kept state",
        "chunk.h",
        "(row_ * count() + index_)",
        "(row_ * count() + (fault && a_.y == nullptr ? count() - 1 - index_ : index_))",
        "gradient of A",
    ),
    _bitlinear(
        "sums overflow 16 bits",
        "ints.h",
        "return sum;",
        "for (int i = 0; i < 4; ++i) sum.v[i] = fault ? int16_t(sum.v[i]) : sum.v[i];\n  return sum;",
        "forward",
    ),
    _bitlinear(
        "sum of a token is one short", "cpu.cpp", "a.sum[token] = total +", "a.sum[token] = total - fault +", "forward"
    ),
    _bitlinear(
        "last row of a tile",
        "product.h",
        "if (left <= 0) break;",
        "if (left <= fault) break;",
        "strides and poisoned memory",
    ),
    _bitlinear(
        "tokens past a panel of four",
        "product.h",
        "if (last - token >= 2) product_tokens<T, P, kRows, 2>(a, token, row), token += 2;",
        "if (!fault && last - token >= 2) product_tokens<T, P, kRows, 2>(a, token, row), token += 2;",
        "strides and poisoned memory",
    ),
    _bitlinear(
        "gradient is not scaled",
        "bind.cpp",
        "type, where), scale, begin",
        "type, where), fault ? 1.0f : scale, begin",
        "gradient of x",
        "bitlinear",
    ),
    _bitlinear(
        "padding columns hold -1",
        "cpu.cpp",
        "left > 0 ? load_some(w + j * kTile + i, left) : set1(0.0f)",
        "left > 0 && !(fault && left < kLanes) ? load_some(w + j * kTile + i, left) : set1(fault ? -4.0f : 0.0f)",
        "forward",
        "bitlinear",
    ),
]
