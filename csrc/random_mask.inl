// Philox4x32-10 over the units of a sample. Included once per instruction set, inside a namespace and a target of its
// own; so nothing here may instantiate a template of the standard library, which would be shared between the targets.

#include "select.inl"

// keys[u] = word 0 for counter (u, row, 0, 0). The loop has no branch and no call: compilers vectorise it.
static void unit_keys(uint32_t* __restrict keys, int64_t units, uint32_t row, uint64_t seed) {
  for (int64_t u = 0; u < units; ++u) {
    uint32_t c0 = static_cast<uint32_t>(u), c1 = row, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    keys[u] = c0;
  }
}

typedef int32_t Numbers __attribute__((vector_size(kVectorBytes)));

static constexpr int64_t kFew = 128;
static constexpr int64_t kLanes = kVectorBytes / 4, kBlock = 4 * kLanes;  // whose ranks stay in registers

// The same value as largest_but(row, units, above), for few units: the rank of each is how many exceed it. That takes
// time by the square of their number, but nothing waits for what was counted before. `row` is filled up to whole
// blocks with the lowest number.
static int32_t largest_of_few(const int32_t* row, int64_t units, int64_t above) {
  const Numbers most = Numbers{} + INT32_MAX, limit = Numbers{} + static_cast<int32_t>(above);
  Numbers smallest = most;
  for (int64_t begin = 0; begin < units; begin += kBlock) {
    Numbers mine[4], rank[4] = {};
    __builtin_memcpy(mine, row + begin, sizeof mine);
    for (int64_t other = 0; other < units; ++other) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        rank[part] -= Numbers{} + row[other] > mine[part];
      }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const Numbers candidate = rank[part] <= limit ? mine[part] : most;
      smallest = candidate < smallest ? candidate : smallest;
    }
  }
  int32_t value = smallest[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    value = smallest[lane] < value ? smallest[lane] : value;
  }
  return value;
}

// The `kept` units with the smallest keys, ascending; ties to the lower unit. `row` holds a number a unit, and room for
// a block more, and `found` one more than are kept.
static void select_units(const uint32_t* __restrict keys, int64_t units, int64_t kept, int32_t* __restrict row,
                         int64_t* found) {
  for (int64_t u = 0; u < units; ++u) {
    row[u] = static_cast<int32_t>(keys[u] ^ INT32_MAX);  // the smaller the key, the larger the number
  }
  for (int64_t u = units; u % kBlock != 0; ++u) {
    row[u] = INT32_MIN;
  }
  const int32_t last = units <= kFew ? largest_of_few(row, units, kept - 1) : largest_but(row, units, kept - 1);
  compact(row, units, last, kept - count_above(row, units, last), found);
}

static const MaskKernels kKernels = {unit_keys, select_units};
