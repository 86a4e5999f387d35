// Working memory of a kernel: one allocation, cut into aligned pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace sparsify {

// Aligned memory that gives itself out piece by piece.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rounded(bytes))))),
        next_(memory_),
        end_(memory_ + rounded(bytes)) {
    if (memory_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::free(memory_);
  }

  static int64_t rounded(int64_t bytes) {
    return (bytes + 64) / 64 * 64;
  }

  void* data() const {
    return memory_;
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    if (next_ > end_) {
      throw std::bad_alloc();
    }
    return piece;
  }

 private:
  char* memory_;
  char* next_;
  char* end_;
};

}  // namespace sparsify
