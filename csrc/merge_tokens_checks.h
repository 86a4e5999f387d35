// Values that merge_tokens refuses, in the words of sparsify_kernels/merge_tokens/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sparsify {

// What names the tokens of a batch: the keys, and which tokens are there. All dense.
struct Names {
  int64_t samples, tokens, slots;
  const int64_t* index;  // [B, K]
  const int64_t* count;  // [B]
  const bool* valid;     // [B, N] or null

  bool there(int64_t b, int64_t i) const {
    return valid == nullptr || valid[b * tokens + i];
  }
};

template <class... Parts>
[[noreturn]] void complain(const Parts&... parts) {
  std::ostringstream text;
  (text << "merge_tokens: " << ... << parts);
  throw std::runtime_error(text.str());
}

// Keys must be valid tokens, and there must be one where there are tokens.
inline void check_keys(const Names& names) {
  for (int64_t b = 0; b < names.samples; ++b) {
    const int64_t count = names.count[b];
    if (count < 0 || count > names.slots) {
      complain("keys.count must be in [0, ", names.slots, "], got ", count, " at [", b, "]");
    }
    for (int64_t i = 0; count == 0 && i < names.tokens; ++i) {
      if (names.there(b, i)) {
        complain("keys.count must be at least 1 where a sample has valid tokens, got 0 at [", b, "]");
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = names.index[b * names.slots + j];
      if (i < 0 || i >= names.tokens) {
        complain("keys.index must be in [0, ", names.tokens, ") below keys.count, got ", i, " at [", b, ", ", j, "]");
      }
      if (!names.there(b, i)) {
        complain("keys.index must name valid tokens below keys.count, got ", i, " at [", b, ", ", j, "]");
      }
    }
  }
}

// As Python prints it.
inline std::string printed(double value) {
  if (std::isnan(value)) {
    return "nan";
  }
  if (std::isinf(value)) {
    return value < 0 ? "-inf" : "inf";
  }
  for (int digits = 1;; ++digits) {
    std::ostringstream text;
    text.precision(digits);
    text << value;
    if (digits >= 17 || std::stod(text.str()) == value) {
      const std::string shortest = text.str();
      return shortest.find_first_of(".e") == std::string::npos ? shortest + ".0" : shortest;
    }
  }
}

template <class T>
void check_weights(const T* weight, const Names& names) {
  for (int64_t at = 0; at < names.samples * names.tokens; ++at) {
    if ((names.valid == nullptr || names.valid[at]) && !(std::isfinite(weight[at]) && weight[at] >= 0)) {
      complain("weight must be finite and >= 0 at valid tokens, got ", printed(static_cast<double>(weight[at])),
               " at [", at / names.tokens, ", ", at % names.tokens, "]");
    }
  }
}

}  // namespace sparsify
