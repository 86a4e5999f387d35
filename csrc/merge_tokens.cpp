// merge_tokens on the CPU: every token joins its most similar key, then each cluster becomes its weighted mean. The
// N x K similarities are compared as they are computed and never stored. The definition is
// sparsify_kernels/merge_tokens/reference.py.

#include "merge_tokens.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common.h"
#include "merge_tokens_checks.h"
#include "segments.h"

namespace sparsify {
namespace {

namespace base {
constexpr int kVectorBytes = 16, kBlock = 6;
#include "merge_tokens.inl"
}  // namespace base

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32, kBlock = 6;
#include "merge_tokens.inl"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64, kBlock = 12;
#include "merge_tokens.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

const MergeKernels& pick_merge_kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::kKernels;
    case Isa::avx2:
      return avx2::kKernels;
    default:
      break;
  }
#endif
  return base::kKernels;
}

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr auto kDouble = torch::headeronly::ScalarType::Double;

const Tensor* address(const std::optional<Tensor>& x) {
  return x ? &*x : nullptr;
}

std::optional<Tensor> dense_if(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(dense(*x)) : std::nullopt;
}

const void* data(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

void check(bool ok, const char* text) {
  if (!ok) {
    throw std::runtime_error(text);
  }
}

bool is(const Tensor* x, std::initializer_list<int64_t> shape) {
  return x == nullptr ||
         (x->dim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), x->sizes().begin()));
}

// Assigns the tokens of a sample, or of a range of it.
class Assign {
 public:
  Assign(const Names& names, const Tensor& metric, int64_t* assign)
      : names_(names), metric_(rows_of(metric)), bytes_(static_cast<int64_t>(metric.element_size())), assign_(assign) {
    const int64_t sum_bytes = bytes_ == 8 ? 8 : 4, dim = std::max<int64_t>(1, metric.size(2));
    constexpr int64_t kTileBytes = 1 << 18;  // the packed keys stay in the second-level cache
    const int64_t panels = std::max<int64_t>(1, kTileBytes / (sum_bytes * dim * kernels_.panel));
    const int64_t keys = (names.slots + kernels_.panel - 1) / kernels_.panel * kernels_.panel;
    job_ = {float_type(metric),
            nullptr,
            metric_.row_stride,
            metric.size(2),
            nullptr,
            0,
            nullptr,
            0,
            std::min(panels * kernels_.panel, keys),
            nullptr};
    keys_bytes_ = job_.tile * dim * sum_bytes;
    rows_bytes_ = std::max<int64_t>(kernels_.block * sum_bytes, 64) * ((dim + 63) / 64 * 64 + 32);
    bf16_ = job_.dtype == Float::bf16 && dim >= 32 ? bf16_kernels() : nullptr;
  }

  // Multiplications and additions for one sample.
  int64_t cost() const {
    return 2 * names_.tokens * names_.slots * job_.dim;
  }

  // Tokens begin..end of samples first..last.
  void operator()(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const auto keys = std::unique_ptr<Line[]>(new Line[static_cast<size_t>(keys_bytes_ / 64 + 1)]);
    const auto rows = std::unique_ptr<Line[]>(new Line[static_cast<size_t>(rows_bytes_ / 64 + kernels_.block)]);
    const auto best = std::make_unique<float[]>(static_cast<size_t>(end - begin));
    std::vector<int64_t> half, other;
    for (int64_t b = first; b < last; ++b) {
      int64_t* assign = assign_ + b * names_.tokens;
      AssignJob job = job_;
      job.metric = static_cast<const char*>(metric_.data) + b * metric_.sample_stride * bytes_;
      job.keys = names_.index + b * names_.slots;
      job.count = names_.count[b];
      job.assign = assign;
      std::fill(assign + begin, assign + end, int64_t{-1});
      for (int64_t j = job.count; j-- > 0;) {  // from behind: a key named twice joins its lower slot
        if (job.keys[j] >= begin && job.keys[j] < end) {
          assign[job.keys[j]] = j;
        }
      }
      const auto fits = [&](int64_t i) {
        return !bf16_->has_small_values(static_cast<const Bf16*>(job.metric) + i * job.row_stride, job.dim);
      };
      const bool halves = bf16_ != nullptr && std::all_of(job.keys, job.keys + job.count, fits);
      half.clear();
      other.clear();
      for (int64_t i = begin; i < end; ++i) {
        if (assign[i] < 0 && names_.there(b, i)) {
          (halves && fits(i) ? half : other).push_back(i);
        }
      }
      if (!half.empty()) {
        job.token = half.data();
        job.tokens = static_cast<int64_t>(half.size());
        bf16_->assign(job, keys.get(), rows.get(), best.get());
      }
      if (!other.empty()) {
        job.token = other.data();
        job.tokens = static_cast<int64_t>(other.size());
        kernels_.assign(job, keys.get(), rows.get(), best.get());
      }
    }
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };

  const MergeKernels& kernels_ = pick_merge_kernels();
  const Names& names_;
  Rows metric_;
  int64_t bytes_;
  int64_t* assign_;
  AssignJob job_;
  int64_t keys_bytes_, rows_bytes_;
  const Bf16Kernels* bf16_;
};

// size[b] = the total weight of each slot, in ascending order of tokens.
template <class T>
void sum_weights(T* size, const T* weight, const int64_t* assign, int64_t b, const Names& names) {
  std::fill(size + b * names.slots, size + (b + 1) * names.slots, T{0});
  for (int64_t at = b * names.tokens; at < (b + 1) * names.tokens; ++at) {
    if (assign[at] >= 0) {
      size[b * names.slots + assign[at]] += weight == nullptr ? T{1} : weight[at];
    }
  }
}

void sum_weights(Float sums, void* size, const void* weight, const int64_t* assign, int64_t b, const Names& names) {
  if (sums == Float::f64) {
    sum_weights(static_cast<double*>(size), static_cast<const double*>(weight), assign, b, names);
  } else {
    sum_weights(static_cast<float*>(size), static_cast<const float*>(weight), assign, b, names);
  }
}

// x [B, N, D], metric [B, N, d], index [B, K], count [B], weight [B, N] in the type of the sums, valid bool [B, N]
// -> tokens [B, K, D], size [B, K], assign int64 [B, N].
std::tuple<Tensor, Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& metric, const Tensor& index,
                                                const Tensor& count, const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& valid) {
  const int64_t samples = x.size(0), tokens = x.size(1), dim = x.size(2), slots = index.size(1);
  const Float dtype = float_type(x);
  const auto sums = dtype == Float::f64 ? kDouble : kFloat;
  check(is(&metric, {samples, tokens, metric.size(2)}) && is(&index, {samples, slots}) && is(&count, {samples}) &&
            is(address(weight), {samples, tokens}) && is(address(valid), {samples, tokens}) && slots < INT32_MAX &&
            (!weight || weight->scalar_type() == sums),
        "merge_tokens: metric must be [B, N, d], index [B, K], count [B], weight and valid [B, N] like x [B, N, D]");
  const Tensor keys = dense(index), counts = dense(count), values = with_rows(x), measure = with_rows(metric);
  const std::optional<Tensor> there = dense_if(valid), weights = dense_if(weight);
  const Names names = {samples,
                       tokens,
                       slots,
                       static_cast<const int64_t*>(keys.const_data_ptr()),
                       static_cast<const int64_t*>(counts.const_data_ptr()),
                       static_cast<const bool*>(data(there))};
  check_keys(names);
  if (weight && sums == kDouble) {
    check_weights(static_cast<const double*>(data(weights)), names);
  } else if (weight) {
    check_weights(static_cast<const float*>(data(weights)), names);
  }

  Tensor merged = torch::stable::new_empty(x, {samples, slots, dim});
  Tensor size = torch::stable::new_empty(x, {samples, slots}, sums);
  Tensor assign = torch::stable::new_empty(index, {samples, tokens});
  int64_t* slot = static_cast<int64_t*>(assign.mutable_data_ptr());
  void* total = size.mutable_data_ptr();
  Segments segments(samples, tokens, slots);
  const Assign assign_tokens(names, measure, slot);
  const SumJob job = {dtype,
                      rows_of(values),
                      dim,
                      tokens,
                      slots,
                      data(weights),
                      total,
                      segments.start(),
                      segments.members(),
                      merged.mutable_data_ptr()};
  const auto sort = [&](int64_t b) {
    segments.sort(b, slot + b * tokens);
    sum_weights(sums == kDouble ? Float::f64 : Float::f32, total, data(weights), slot, b, names);
  };

  const int64_t bytes = tokens * dim * static_cast<int64_t>(x.element_size());
  const int64_t threads = torch::stable::get_num_threads();
  if (samples >= 2 * threads) {  // whole samples to each thread: what it has read is at hand for the next step
    const int64_t cost = assign_tokens.cost() / 16 + bytes;
    torch::stable::parallel_for(0, samples, grain(cost), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        assign_tokens(b, b + 1, 0, tokens);
        sort(b);
        sum_segments(job, b * slots, (b + 1) * slots);
      }
    });
    return {merged, size, assign};
  }
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t cost = assign_tokens.cost() / 16 / std::max<int64_t>(1, tokens);
    torch::stable::parallel_for(0, tokens, std::max<int64_t>(64, grain(cost)),
                                [&](int64_t begin, int64_t end) { assign_tokens(b, b + 1, begin, end); });
    sort(b);
  }
  torch::stable::parallel_for(0, samples * slots, grain(bytes / slots),
                              [&](int64_t begin, int64_t end) { sum_segments(job, begin, end); });
  return {merged, size, assign};
}

// Gradients of x [B, N, D] and weight [B, N]; one that is not wanted is an empty tensor [0].
std::tuple<Tensor, Tensor> merge_tokens_backward(const std::optional<Tensor>& grad_tokens,
                                                 const std::optional<Tensor>& grad_size, const std::optional<Tensor>& x,
                                                 const std::optional<Tensor>& weight, const Tensor& tokens,
                                                 const Tensor& size, const Tensor& assign, std::vector<bool> wanted) {
  const int64_t samples = assign.size(0), length = assign.size(1), slots = tokens.size(1), dim = tokens.size(2);
  const Float dtype = float_type(tokens);
  const auto sums = dtype == Float::f64 ? kDouble : kFloat;
  check(is(&tokens, {samples, slots, dim}) && is(&size, {samples, slots}) &&
            is(address(grad_tokens), {samples, slots, dim}) && is(address(grad_size), {samples, slots}) &&
            is(address(x), {samples, length, dim}) && is(address(weight), {samples, length}) && wanted.size() == 2,
        "merge_tokens_backward: the gradients must have the shapes of tokens [B, K, D] and size [B, K]");
  for (const Tensor* same : {address(grad_tokens), address(x)}) {
    check(same == nullptr || float_type(*same) == dtype, "merge_tokens_backward: tokens and x must have one dtype");
  }
  for (const Tensor* same : {address(grad_size), address(weight), &size}) {
    check(same == nullptr || same->scalar_type() == sums, "merge_tokens_backward: sizes must have the type of sums");
  }
  const Tensor slot = dense(assign), total = dense(size), mean = with_rows(tokens);
  const std::optional<Tensor> weights = dense_if(weight), slopes = dense_if(grad_size);
  const std::optional<Tensor> grad = grad_tokens ? std::optional(with_rows(*grad_tokens)) : std::nullopt;
  const std::optional<Tensor> values = x && wanted[1] ? std::optional(with_rows(*x)) : std::nullopt;
  Tensor dx =
      wanted[0] ? torch::stable::new_empty(tokens, {samples, length, dim}) : torch::stable::new_empty(tokens, {0});
  Tensor dweight = wanted[1] ? torch::stable::new_empty(size, {samples, length}) : torch::stable::new_empty(size, {0});
  GradientJob job = {dtype,
                     {},
                     {},
                     rows_of(mean),
                     dim,
                     length,
                     slots,
                     data(slopes),
                     data(weights),
                     total.const_data_ptr(),
                     static_cast<const int64_t*>(slot.const_data_ptr()),
                     nullptr,
                     nullptr,
                     false};
  if (grad) {
    job.grad = rows_of(*grad);
  }
  if (wanted[0]) {
    constexpr int64_t kStreamFrom = 4 << 20;  // no second-level cache would hold it until it is read
    job.dx = dx.mutable_data_ptr();
    const int64_t row = dim * static_cast<int64_t>(dx.element_size());
    job.streamed =
        samples * length * row >= kStreamFrom && row % 64 == 0 && reinterpret_cast<uintptr_t>(job.dx) % 64 == 0;
  }
  if (values) {
    job.x = rows_of(*values);
    job.dweight = dweight.mutable_data_ptr();
  } else if (wanted[1]) {
    torch::stable::zero_(dweight);
  }
  const int64_t bytes = dim * static_cast<int64_t>(tokens.element_size()) * (wanted[1] ? 4 : 2);
  const MergeKernels& kernels = pick_merge_kernels();
  torch::stable::parallel_for(0, samples * length, grain(bytes), [&](int64_t begin, int64_t end) {
    kernels.gradients(job, begin, end);
    end_stream();
  });
  return {dx, dweight};
}

}  // namespace

void register_merge_tokens(Library& library) {
  library.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  library.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward));
}

}  // namespace sparsify
