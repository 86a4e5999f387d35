// Sums of rows by destination: the members of every segment in ascending order, then one writer a segment. So results
// are the same on every run and for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common.h"

namespace sparsify {

// Which rows belong to which segment, for every sample: a stable counting sort.
class Segments {
 public:
  Segments(int64_t samples, int64_t rows, int64_t segments)
      : rows_(rows),
        segments_(segments),
        start_(static_cast<size_t>(samples * (segments + 1))),
        members_(static_cast<size_t>(samples * rows)) {}

  // Takes the segment of every row of sample b; rows whose segment is outside [0, segments) belong to none.
  void sort(int64_t b, const int64_t* segment) {
    int64_t* start = start_.data() + b * (segments_ + 1);
    int64_t* members = members_.data() + b * rows_;
    std::fill(start, start + segments_ + 1, int64_t{0});
    for (int64_t i = 0; i < rows_; ++i) {
      if (segment[i] >= 0 && segment[i] < segments_) {
        ++start[segment[i]];
      }
    }
    for (int64_t j = 0, total = 0; j <= segments_; ++j) {  // where each segment ends
      total += start[j];
      start[j] = total;
    }
    for (int64_t i = rows_; i-- > 0;) {  // filled from behind, after which `start` is where it begins
      if (segment[i] >= 0 && segment[i] < segments_) {
        members[--start[segment[i]]] = i;
      }
    }
  }

  // [B, segments + 1]: where the members of each segment begin among those of its sample, and where the last ends.
  const int64_t* start() const {
    return start_.data();
  }

  // [B, rows]: rows by segment, ascending within each.
  const int64_t* members() const {
    return members_.data();
  }

 private:
  int64_t rows_, segments_;
  std::vector<int64_t> start_, members_;
};

// out [B, segments, values] = the weighted sum of each segment's rows; with `size` [B, segments], the mean: divided by
// it, and 0 where it is 0. `weight` [B, count] and `size` are in the type of the sums; without weights all are 1.
struct SumJob {
  Float dtype;
  Rows rows;  // [B, count, values]
  int64_t values, count, segments;
  const void* weight;
  const void* size;
  const int64_t* start;
  const int64_t* members;
  void* out;
};

// Segments begin..end of [B * segments].
void sum_segments(const SumJob& job, int64_t begin, int64_t end);

}  // namespace sparsify
