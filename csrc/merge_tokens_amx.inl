// The nearest key by tiles of bf16: 32 tokens by 32 keys at a time. Included inside a target that has AMX.

#include "merge_tokens_pairs.inl"

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {
  static constexpr int64_t kTokens = 32;

  static inline void multiply(const PairJob& job, Sixteen (&sums)[kTokens][2]) {
    const size_t pitch = static_cast<size_t>(job.pitch) * 2;
    __asm__ volatile("" ::: "memory");  // the tile loads do not say that they read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < job.steps; ++step) {
      const uint16_t* rows = job.rows + step * 2 * kPairs;
      const uint32_t* keys = job.panel + step * kKeys * kPairs;
      _tile_loadd(4, rows, pitch);
      _tile_loadd(5, rows + 16 * job.pitch, pitch);
      _tile_loadd(6, keys, 64);
      _tile_loadd(7, keys + 16 * kPairs, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &sums[0][0], sizeof sums[0]);
    _tile_stored(1, &sums[0][1], sizeof sums[0]);
    _tile_stored(2, &sums[16][0], sizeof sums[0]);
    _tile_stored(3, &sums[16][1], sizeof sums[0]);
    __asm__ volatile("" ::: "memory");
  }
};

static void assign(const AssignJob& job, void* keys, void* rows, float* best) {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  assign_pairs<Tiles>(job, keys, rows, best);
  _tile_release();
}
