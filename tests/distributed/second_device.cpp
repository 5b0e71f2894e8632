// A device of its own in the memory of the CPU: PyTorch keeps its tensors apart from the CPU's as it
// keeps a GPU's, and every operation is carried out by the CPU's kernel on the same bytes.
//
// An operation that is given both kinds fails, as on a GPU, and everything that would make the host
// wait for a GPU is counted.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(KIND, 0);

std::atomic<int64_t> waits{0};

// Their results' sizes, or results themselves, depend on values: a GPU has to have come to them.
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount"};

// Positions may lie on the host, here as on a GPU.
const std::set<std::string> INDEXING = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
    "aten::_unsafe_index_put", "aten::_index_put_impl_"};

void release(void* bytes) { std::free(bytes); }

struct Memory final : public c10::Allocator {
  c10::DataPtr allocate(size_t count) override {
    void* bytes = count == 0 ? nullptr : std::aligned_alloc(64, (count + 63) / 64 * 64);
    return {bytes, bytes, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

// One device with one stream, whose work is always done.
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(const c10::Storage& storage, size_t count) {
  auto fresh = memory.allocate(count);
  if (storage.nbytes() > 0) {
    std::memcpy(fresh.get(), storage.data(), std::min(count, storage.nbytes()));
  }
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(count);
}

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t count) const override {
    grow(storage, count);
  }
};
Hooks hooks;

bool is_here(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == KIND;
}

// The same bytes as a tensor of the CPU, which keeps them alive.
at::Tensor on_cpu(const at::Tensor& tensor) {
  auto* held = new c10::Storage(tensor.storage());
  c10::DataPtr bytes(
      held->mutable_data(), held, [](void* it) { delete static_cast<c10::Storage*>(it); },
      c10::Device(c10::kCPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), held->nbytes(), std::move(bytes),
      c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  auto result = at::empty({0}, tensor.options().device(c10::kCPU).requires_grad(false));
  return result.set_(storage, tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (is_here(self) && !is_here(to)) ++waits;
  auto target = is_here(to) ? on_cpu(to) : to;
  target.copy_(is_here(self) ? on_cpu(self) : self);
  return to;
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++waits;
  return at::_local_scalar_dense(on_cpu(self));
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  c10::SymInt count(static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())), one(1);
  return set_storage(self, std::move(source), 0, {&count, 1}, {&one, 1});
}

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t needed = (impl->numel() + impl->storage_offset()) * impl->dtype().itemsize();
  if (needed > impl->storage().nbytes()) grow(impl->storage(), needed);
  return self;
}

int64_t plain_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return 0;
}

// Any other operation: the CPU's kernel on the same bytes.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  c10::IValue take(const c10::IValue& value) {
    if (value.isTensor()) return take(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> taken;
      for (const auto& one : value.toTensorVector()) taken.push_back(take(one));
      return taken;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> taken;
      for (const auto& one : value.toOptionalTensorVector()) {
        taken.push_back(one ? std::optional<at::Tensor>(take(*one)) : std::nullopt);
      }
      return taken;
    }
    if (value.isDevice() && value.toDevice().type() == KIND) {
      makes_ = true;
      return c10::Device(c10::kCPU);
    }
    TORCH_CHECK(
        !value.isGenerator() || value.toGenerator().device().type() == KIND, name_,
        ": a generator of the CPU, and a tensor that is not");
    return value;
  }

  void check() const {
    if (pairs_.empty() || INDEXING.count(name_) > 0) return;
    for (const auto& stranger : strangers_) {
      TORCH_CHECK(
          false, name_, ": expected all tensors to be on the same device, but one of shape ",
          stranger.sizes(), " is on ", stranger.device());
    }
  }

  // What was resized got other bytes.
  void settle() const {
    for (const auto& [mine, cpu] : pairs_) {
      bool moved = cpu.numel() > 0 && cpu.storage().data() != mine.storage().data();
      if (!moved && mine.sizes() == cpu.sizes()) continue;
      mine.resize_(cpu.sizes());
      on_cpu(mine).copy_(cpu);
    }
  }

  c10::IValue give(const c10::IValue& value) const {
    if (value.isTensor()) return give(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> given;
      for (const auto& one : value.toTensorVector()) given.push_back(give(one));
      return given;
    }
    return value;
  }

 private:
  at::Tensor take(const at::Tensor& tensor) {
    if (!is_here(tensor)) {
      if (tensor.defined() && tensor.dim() > 0) strangers_.push_back(tensor);
      return tensor;
    }
    pairs_.emplace_back(tensor, on_cpu(tensor));
    return pairs_.back().second;
  }

  at::Tensor give(const at::Tensor& tensor) const {
    if (!tensor.defined() || is_here(tensor)) return tensor;
    for (const auto& [mine, cpu] : pairs_) {
      if (cpu.is_same(tensor)) return mine;
    }
    for (const auto& [mine, cpu] : pairs_) {
      bool same = tensor.numel() > 0 && tensor.storage().data() == mine.storage().data();
      if (same && tensor.scalar_type() == mine.scalar_type()) {
        return at::native::as_strided_tensorimpl(
            mine, tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
    }
    if (pairs_.empty() && !makes_) return tensor;
    auto result = empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
    on_cpu(result).copy_(tensor);
    return result;
  }

  std::string name_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::vector<at::Tensor> strangers_;
  bool makes_ = false;
};

void by_cpu(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = handle.schema();
  Call call(schema.operator_name().name);
  waits += static_cast<int64_t>(WAITING.count(schema.operator_name().name));
  std::vector<c10::IValue> taken;
  for (const auto& value : torch::jit::last(*stack, schema.arguments().size())) {
    taken.push_back(call.take(value));
  }
  call.check();
  torch::jit::drop(*stack, schema.arguments().size());
  for (auto& value : taken) stack->push_back(std::move(value));
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  std::vector<c10::IValue> given;
  for (const auto& value : torch::jit::last(*stack, schema.returns().size())) {
    given.push_back(call.give(value));
  }
  torch::jit::drop(*stack, schema.returns().size());
  for (auto& value : given) stack->push_back(std::move(value));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("resize_", &resize);
  m.impl("_fused_sdp_choice", &plain_attention);
}

TORCH_LIBRARY(second_device, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("waits() -> int", []() { return waits.load(); });
}

}  // namespace

namespace at::autocast {

// The lists of a GPU, which are not the CPU's.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_OUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_OUT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
}

}  // namespace at::autocast
