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

// The `kept` units with the smallest keys, ascending; ties to the lower unit. `row` holds a number a unit, and `found`
// one more than are kept.
static void select_units(const uint32_t* __restrict keys, int64_t units, int64_t kept, int32_t* __restrict row,
                         int64_t* found) {
  for (int64_t u = 0; u < units; ++u) {
    row[u] = static_cast<int32_t>(keys[u] ^ INT32_MAX);  // the smaller the key, the larger the number
  }
  const int32_t last = largest_but(row, units, kept - 1);
  compact(row, units, last, kept - count_above(row, units, last), found);
}

static const MaskKernels kKernels = {unit_keys, select_units};
