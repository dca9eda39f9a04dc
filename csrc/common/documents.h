// The documents of a batch, for bind.cpp files: `segments` is checked, and padding inside a document (a gap) is moved
// out of the kernel's way. A kernel then reads documents without gaps:
//
//   const Documents documents(segments, where);
//   ... documents.close(q), documents.segments() ...   // the gaps of each row go to its end
//   return documents.open(o);                          // every token goes back
#pragma once

#include <cstring>
#include <vector>

#include "common/bind.h"

namespace uz {

class Documents {
 public:
  // Throws unless `segments`, if there are any, are (batch, length) int64 of which each document is one run of tokens.
  Documents(const Optional& segments, const char* where) : where_(where) {
    if (!segments) return;
    Arguments(where, *segments).tensor("segments", *segments, "batch, length", ScalarType::Long);
    rows_ = segments->size(0), length_ = segments->size(1);
    segments_ = torch::stable::contiguous(*segments);
    const int64_t* ids = segments_->const_data_ptr<int64_t>();
    bool gaps = false;
    for (int64_t row = 0; row < rows_; ++row) gaps = check_row(ids + row * length_, row) || gaps;
    if (!gaps) return;
    order_.resize(static_cast<size_t>(rows_ * length_));
    for (int64_t row = 0; row < rows_; ++row) close_row(ids + row * length_, order_.data() + row * length_);
    segments_ = close(*segments_);
  }

  // Without gaps.
  const Optional& segments() const { return segments_; }

  // x (batch, prefix + length, ...) with the gaps behind the prefix moved to the end of the row; x itself without gaps.
  Tensor close(const Tensor& x, int64_t prefix = 0) const { return move(x, prefix, true); }

  // Undoes close().
  Tensor open(const Tensor& x, int64_t prefix = 0) const { return move(x, prefix, false); }

 private:
  // Whether the row has gaps.
  bool check_row(const int64_t* ids, int64_t row) const {
    int64_t document = 0, lowest = 0, highest = 0;  // of the real tokens so far
    bool gaps = false;
    for (int64_t at = 0; at < length_; ++at) {
      const int64_t id = ids[at];
      if (id == document && id != 0) {
        gaps = gaps || ids[at - 1] == 0;
      } else if (id != 0) {
        if (id < 0)
          fail(where_, ": segments[row ", row, "]: got ", id, " at position ", at,
               ", expected 0 at padding and positive numbers of documents");
        if (document != 0 && lowest <= id && id <= highest)  // numbers that do not only grow or only fall
          for (int64_t i = 0; i < at; ++i)
            if (ids[i] == id)
              fail(where_, ": segments[row ", row, "]: document ", id, " returns at position ", at, " after document ",
                   document, "; number documents so that each is one run of tokens (zeros between them are padding)");
        lowest = document == 0 || id < lowest ? id : lowest;
        highest = id > highest ? id : highest;
        document = id;
      }
    }
    return gaps;
  }

  // For each place without gaps, the token that goes there.
  void close_row(const int64_t* ids, int64_t* order) const {
    std::vector<int64_t> gaps;
    int64_t document = 0, real = -1, to = 0;  // the last real token, its document
    for (int64_t at = 0; at < length_; ++at) {
      if (ids[at] == 0) continue;
      const bool inside = ids[at] == document;
      for (int64_t padding = real + 1; padding < at; ++padding) {
        if (inside) {
          gaps.push_back(padding);
        } else {
          order[to++] = padding;
        }
      }
      order[to++] = at;
      document = ids[at], real = at;
    }
    for (int64_t padding = real + 1; padding < length_; ++padding) order[to++] = padding;
    for (const int64_t padding : gaps) order[to++] = padding;
  }

  Tensor move(const Tensor& x, int64_t prefix, bool closing) const {
    if (order_.empty()) return x;
    if (x.dim() < 2 || x.size(0) != rows_ || x.size(1) - length_ != prefix || prefix < 0)
      fail(where_, ": segments: got shape ", text_of(std::vector<int64_t>{rows_, length_}), " beside tokens of shape ",
           shape_of(x), ", expected one batch and length");
    const Tensor from = torch::stable::contiguous(x);
    Tensor to = empty_contiguous(from, from.scalar_type());
    if (from.numel() == 0) return to;
    const int64_t whole = prefix + length_;
    const size_t bytes = static_cast<size_t>(from.numel() / (rows_ * whole)) * from.element_size();
    const char* source = static_cast<const char*>(from.const_data_ptr());
    char* target = static_cast<char*>(to.mutable_data_ptr());
    for (int64_t row = 0; row < rows_; ++row, source += whole * bytes, target += whole * bytes) {
      std::memcpy(target, source, prefix * bytes);
      for (int64_t i = 0; i < length_; ++i) {
        const int64_t open = prefix + order_[row * length_ + i], closed = prefix + i;
        std::memcpy(target + (closing ? closed : open) * bytes, source + (closing ? open : closed) * bytes, bytes);
      }
    }
    return to;
  }

  const char* where_;
  Optional segments_;
  int64_t rows_ = 0, length_ = 0;
  std::vector<int64_t> order_;  // (batch, length), empty without gaps
};

// For kernels that pass over gaps themselves.
inline void check_documents(const Optional& segments, const char* where) { const Documents documents(segments, where); }

}  // namespace uz
