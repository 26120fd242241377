// A simulated accelerator for machines without one, as PyTorch's PrivateUse1 device.
//
// Its memory is the host's and its kernels are the CPU's. It is strict where a real one is: operators refuse tensors of
// two devices and generators of another device, and float64 is refused if `set_float64("refuse")` was called, as on
// Apple's MPS. It counts kernel launches, and calls a Python function at every wait of the host for the device.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;

// ------------------------------------------------------------------------------------------------------------ counts

std::mutex mutex;
std::map<std::string, long> launch_counts;
std::atomic<long> launched{0};
std::set<const void*> pinned_blocks;
PyObject* wait_listener = nullptr;
std::string float64 = "allow";  // or "report" as a wait, or "refuse"
thread_local DeviceIndex current_device = 0;
thread_local int depth = 0;  // inside an operator: the copies that it makes of its own are not the program's

struct InsideOperator {
  InsideOperator() { ++depth; }
  ~InsideOperator() { --depth; }
};

void count_launch(const std::string& kernel) {
  if (depth) return;
  std::lock_guard<std::mutex> guard(mutex);
  ++launch_counts[kernel];
  ++launched;
}

void host_waits(const std::string& why) {
  if (depth || !wait_listener) return;
  pybind11::gil_scoped_acquire gil;
  pybind11::reinterpret_borrow<pybind11::function>(wait_listener)(why);
}

void check_dtype(std::optional<at::ScalarType> dtype) {
  if (dtype.value_or(at::kFloat) != at::kDouble || float64 == "allow") return;
  if (float64 == "report") return host_waits("float64");
  TORCH_CHECK_TYPE(false, "this device has no float64 (Apple's MPS has none either)");
}

// ------------------------------------------------------------------------------------------------------------ memory

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {block, block, &c10::free_cpu, Device(kSim, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(kSim, &device_memory);

struct PinnedMemory final : c10::Allocator {
  static void give_back(void* block) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      pinned_blocks.erase(block);
    }
    c10::free_cpu(block);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* block = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> guard(mutex);
    pinned_blocks.insert(block);
    return {block, block, &give_back, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

// --------------------------------------------------------------------------------------------------- device, streams

struct Recorded { long after; };  // an event: how many kernels had been launched when it was recorded

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  Device getDevice() const override { return Device(kSim, current_device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("synchronize"); }
  void synchronizeDevice(const DeviceIndex) const override { host_waits("synchronize"); }

  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Recorded;
    static_cast<Recorded*>(*event)->after = launched;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Recorded*>(event); }
  // With work queued behind the event the device stays busy while the host waits, and that costs nothing.
  void synchronizeEvent(void* event) const override {
    host_waits(static_cast<Recorded*>(event)->after == launched ? "synchronize" : "event of earlier work");
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) {
    device_ = Device(kSim, index < 0 ? current_device : index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct DeviceHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current_device, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  Device getDeviceFromPtr(void*) const override { return Device(kSim, current_device); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static const at::Generator own[kDevices] = {getNewGenerator(0), getNewGenerator(1)};
    return own[index < 0 ? current_device : index];
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* block) const override {
    std::lock_guard<std::mutex> guard(mutex);
    return pinned_blocks.count(block);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto larger = device_memory.allocate(bytes);
    if (storage.data()) std::memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    auto& changed = const_cast<c10::Storage&>(storage);
    changed.set_data_ptr(std::move(larger));
    changed.set_nbytes(bytes);
  }
};

// --------------------------------------------------------------------------------------------------- basic operators

Tensor seen_by_host(const Tensor& tensor) {  // shares the memory
  if (tensor.device().is_cpu()) return tensor;
  auto options = tensor.options().device(at::kCPU).pinned_memory(false).requires_grad(false);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_dtype(dtype);
  c10::DeviceGuard guard(device.value_or(Device(kSim, current_device)));
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  check_dtype(dtype);
  c10::DeviceGuard guard(device.value_or(Device(kSim, current_device)));
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool enters = from.is_cpu(), leaves = to.is_cpu();
  count_launch(enters ? "copy to the device" : leaves ? "copy to the host" : "copy");
  if (enters && !(non_blocking && from.is_pinned())) host_waits("copy from pageable memory");
  if (leaves && !(non_blocking && to.is_pinned())) host_waits("copy to the host");
  seen_by_host(to).copy_(seen_by_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes());
  seen_by_host(to).copy_(seen_by_host(from));
  return to;
}

at::Scalar item(const Tensor& tensor) {
  host_waits("item");
  return seen_by_host(tensor).item();
}

const Tensor& resize(const Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto other = at::empty(size, tensor.options(), format);
  if (tensor.numel()) std::memcpy(other.data_ptr(), tensor.data_ptr(), std::min(tensor.nbytes(), other.nbytes()));
  auto* changed = tensor.unsafeGetTensorImpl();
  changed->set_storage_keep_dtype(other.storage());
  changed->set_sizes_and_strides(other.sizes(), other.strides(), 0);
  return tensor;
}

// ---------------------------------------------------------------------------------------------------- every operator

// The shape of what they return is known to the device alone, or they return it to the host.
const std::set<std::string> kWaiting = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal", "aten::bincount",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_qr"};
const std::set<std::string> kTakesIndicesOfHost = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void refuse_two_devices(const std::set<std::string>& devices, const std::string& name) {
  TORCH_CHECK(devices.size() < 2, "Expected all tensors to be on the same device, but found at least two devices, ",
              *devices.rbegin(), " and ", *devices.begin(), "! (in ", name, ")");
}

class Arguments {  // of a call: what is to be checked in them
 public:
  Arguments(const c10::FunctionSchema& schema, torch::jit::Stack* stack)
      : schema_(schema), stack_(stack), first_(stack->size() - schema.arguments().size()) {
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto& value = (*stack_)[first_ + i];
      if (value.isTensor()) look_at(value.toTensor(), false);
      if (value.isTensorList())
        for (const Tensor& each : value.toTensorVector()) look_at(each, true);
      if (value.isOptionalTensorList())
        for (const auto& each : value.toOptionalTensorVector())
          if (each) look_at(*each, true);
      if (schema.arguments()[i].name() == "generator") generator_ = i;
    }
  }

  const std::set<std::string>& devices() const { return devices_; }
  bool has_mask() const { return has_mask_; }

  // The CPU's kernels take a generator of the CPU: one in the state of the device's, which is then moved on.
  at::Generator borrow_generator() {
    if (generator_ < 0 || devices_.empty()) return {};
    auto& place = (*stack_)[first_ + generator_];
    auto own = place.isGenerator()
                   ? place.toGenerator()
                   : at::globalContext().getAcceleratorHooksInterface(kSim).getDefaultGenerator(-1);
    TORCH_CHECK(own.device().type() == kSim, "Expected a '", c10::DeviceTypeName(kSim, true),
                "' device type for generator but found '", own.device().type(), "' (in ", schema_.name(), ")");
    borrowed_ = at::make_generator<at::CPUGeneratorImpl>();
    borrowed_.set_state(own.get_state());
    place = borrowed_;
    return own;
  }
  void return_generator(at::Generator own) {
    if (own.defined()) own.set_state(borrowed_.get_state());
  }

 private:
  void look_at(const Tensor& tensor, bool in_list) {
    if (!tensor.defined()) return;
    if (tensor.is_cpu() && tensor.dim() == 0 && !in_list) return;  // a number: real accelerators take it as well
    if (tensor.is_cpu() && in_list && kTakesIndicesOfHost.count(schema_.name())) return;
    has_mask_ |= in_list && tensor.scalar_type() == at::kBool;
    devices_.insert(tensor.device().str());
  }

  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  size_t first_;
  int generator_ = -1;
  bool has_mask_ = false;
  std::set<std::string> devices_;
  at::Generator borrowed_;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Arguments arguments(schema, stack);
  refuse_two_devices(arguments.devices(), schema.name());
  auto generator = arguments.borrow_generator();
  count_launch(schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name());
  if (kWaiting.count(schema.name()) || arguments.has_mask()) host_waits(schema.name());
  InsideOperator here;
  at::native::cpu_fallback(op, stack);
  arguments.return_generator(generator);
}

// Convolutions have a slot of their own for devices that PyTorch does not know.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const bool has_bias = bias && bias->defined();
  std::set<std::string> devices = {input.device().str(), weight.device().str()};
  if (has_bias) devices.insert(bias->device().str());
  refuse_two_devices(devices, "aten::convolution");
  count_launch("aten::convolution");
  InsideOperator here;
  auto host_bias = has_bias ? std::optional<Tensor>(seen_by_host(*bias)) : std::nullopt;
  auto result = at::convolution_symint(seen_by_host(input), seen_by_host(weight), host_bias, stride, padding, dilation,
                                       transposed, output_padding, groups);
  return result.to(input.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  count_launch("aten::convolution_backward");
  InsideOperator here;
  std::array<c10::SymInt, 1> bias_size{weight.sym_size(transposed ? 1 : 0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      seen_by_host(grad), seen_by_host(input), seen_by_host(weight),
      at::OptionalSymIntArrayRef(c10::SymIntArrayRef(bias_size)), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  auto back = [&](const Tensor& tensor) { return tensor.defined() ? tensor.to(input.device()) : tensor; };
  return {back(of_input), back(of_weight), back(of_bias)};
}

using SetStorage = Tensor& (*)(Tensor&, at::Storage, int64_t, at::IntArrayRef, at::IntArrayRef);

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("view", &at::native::view);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Storage", &at::native::set_);
  library.impl("set_.source_Storage_storage_offset", static_cast<SetStorage>(&at::native::set_storage_cpu_));
  // PyTorch would take these apart; CUDA has one kernel for a whole list.
  for (const char* name : {"_foreach_add_.List", "_foreach_add_.Scalar", "_foreach_copy_", "_foreach_lerp_.Scalar",
                           "_foreach_mul_.Scalar", "_foreach_mul_.Tensor", "_foreach_norm.Scalar", "_foreach_sub_.List"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // PyTorch's macros want this name
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FLOAT32)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(WIDEST)
}

PYBIND11_MODULE(simgpu_kernels, m) {
  static DeviceHooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("launches", [] {
    std::lock_guard<std::mutex> guard(mutex);
    return launch_counts;
  });
  m.def("forget_launches", [] {
    std::lock_guard<std::mutex> guard(mutex);
    launch_counts.clear();
  });
  m.def("set_wait_listener", [](pybind11::object listener) {
    Py_XDECREF(wait_listener);
    wait_listener = listener.is_none() ? nullptr : listener.release().ptr();
  });
  m.def("set_float64", [](const std::string& what) { float64 = what; });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int index) { current_device = static_cast<DeviceIndex>(index); });
}
