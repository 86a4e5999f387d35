// The nearest key by products of bf16 without widening: they are exact, the sums are in fp32. Units that multiply so
// take values in pairs and numbers below 2^-126 for zero, products too: tokens with values small enough for that to
// matter do not come here (has_small_values). What the units share; included inside the target of one.

#include "merge_tokens_lanes.inl"
#include "small_values.inl"

static constexpr int64_t kKeys = 32, kPairs = 16;  // of a panel, and of a step through its values

typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t SixteenSlots __attribute__((vector_size(64)));

// Below 2^-40 products of other values may be lost beside a value's, or its own.
static bool has_small_values(const Bf16* row, int64_t dim) {
  return has_values_below<-40>(row, dim);
}

// panel [steps][2][kPairs][16] of pairs: 16 keys beside each other, twice, for each 32 values; NaN beside the keys,
// zeros behind their values.
static void pack_pairs(uint32_t* panel, const AssignJob& job, const int64_t* keys, int64_t count, int64_t steps) {
  const uint16_t* metric = static_cast<const uint16_t*>(job.metric);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t group = 0; group < kKeys; group += 16) {
      SixteenSlots square[16];
      const int64_t left = job.dim - step * 32, values = left < 32 ? left : 32;
      for (int64_t lane = 0; lane < 16; ++lane) {
        square[lane] = SixteenSlots{} + (group + lane < count ? 0 : 0x7FC07FC0);
        if (group + lane < count) {
          const uint16_t* key = metric + keys[group + lane] * job.row_stride + step * 32;
          if (values == 32) {
            __builtin_memcpy(&square[lane], key, 64);
          } else {
            __builtin_memcpy(&square[lane], key, static_cast<size_t>(values) * 2);
          }
        }
      }
      transpose<SixteenSlots, SixteenSlots>(square);
      __builtin_memcpy(panel + (step * kKeys + group) * kPairs, square, sizeof square);
    }
  }
}

// What a unit multiplies at a time: rows [Unit::kTokens] of 32 * steps values, `pitch` apart, by the first `keys` of a
// panel.
struct PairJob {
  const uint16_t* rows;
  int64_t pitch;
  const uint32_t* panel;
  int64_t steps, keys;
};

// Unit::multiply(job, sums) writes all sums [kTokens][2] of 16 keys: beyond the keys NaN, as what is packed there
// gives.
template <class Unit>
static inline void assign_pairs(const AssignJob& job, void* key_scratch, void* row_scratch, float* best) {
  constexpr int64_t kTokens = Unit::kTokens;
  const uint16_t* metric = static_cast<const uint16_t*>(job.metric);
  const int64_t steps = (job.dim + 31) / 32, panel_size = steps * kKeys * kPairs;
  const int64_t pitch = 32 * (steps | 1);  // an odd number of cache lines: rows do not compete for the same ones
  uint32_t* panels = static_cast<uint32_t*>(key_scratch);
  uint16_t* rows = static_cast<uint16_t*>(row_scratch);  // [kTokens][pitch]
  SixteenSlots lanes;
  for (int lane = 0; lane < 16; ++lane) {
    lanes[lane] = lane;
  }
  for (int64_t n = 0; n < job.tokens; ++n) {
    best[n] = -__builtin_inff();
    job.assign[job.token[n]] = 0;
  }
  for (int64_t tile = 0; tile < job.count; tile += job.tile) {
    const int64_t tile_end = job.count - tile < job.tile ? job.count : tile + job.tile;
    for (int64_t j = tile; j < tile_end; j += kKeys) {
      const int64_t left = tile_end - j;
      pack_pairs(panels + (j - tile) / kKeys * panel_size, job, job.keys + j, left < kKeys ? left : kKeys, steps);
    }
    for (int64_t block = 0; block < job.tokens; block += kTokens) {
      const int64_t there = job.tokens - block < kTokens ? job.tokens - block : kTokens;
      for (int64_t r = 0; r < kTokens; ++r) {
        uint16_t* to = rows + r * pitch;
        const uint16_t* row = metric + job.token[block + (r < there ? r : there - 1)] * job.row_stride;
        __builtin_memcpy(to, row, static_cast<size_t>(job.dim) * 2);
        __builtin_memset(to + job.dim, 0, static_cast<size_t>(32 * steps - job.dim) * 2);
      }
      Sixteen similarity[kTokens];
      SixteenSlots slot[kTokens];
      for (int64_t r = 0; r < kTokens; ++r) {
        similarity[r] = Sixteen{} - __builtin_inff();
        slot[r] = SixteenSlots{};
      }
      for (int64_t j = tile; j < tile_end; j += kKeys) {
        Sixteen sums[kTokens][2];
        Unit::multiply({rows, pitch, panels + (j - tile) / kKeys * panel_size, steps, tile_end - j}, sums);
        for (int half = 0; half < 2; ++half) {
          const SixteenSlots slots = lanes + static_cast<int32_t>(j + 16 * half);
          for (int64_t r = 0; r < kTokens; ++r) {
            const auto better = sums[r][half] > similarity[r];
            similarity[r] = better ? sums[r][half] : similarity[r];
            slot[r] = better ? slots : slot[r];
          }
        }
      }
      for (int64_t r = 0; r < there; ++r) {
        settle(similarity[r], slot[r], job.assign + job.token[block + r], best + block + r);
      }
    }
  }
}
