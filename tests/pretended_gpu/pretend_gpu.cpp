// Two pretended GPUs for a CPU build of torch, so that fake tensors can be on "cuda".
//
// A fake tensor has no memory, and no kernel runs. But copies and autograd ask the device's guard
// for the current device and stream, and autograd asks the CUDA hooks whether there is a GPU. A CPU
// build brings neither. Load this library before torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 2; // more than one, for a tensor to be on the wrong one
constexpr c10::DeviceIndex kCurrent = 0;

c10::Device current() {
  return c10::Device(c10::DeviceType::CUDA, kCurrent);
}

c10::Stream default_stream(c10::Device device) {
  const auto index = device.has_index() ? device.index() : kCurrent;
  return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, index));
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return current(); }
  c10::Device getDevice() const override { return current(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return default_stream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return default_stream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return default_stream(stream.device());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {

struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return kCurrent; }
  DeviceIndex getCurrentDevice() const override { return kCurrent; }
};

// Torch looks the hooks up under this name.
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)

} // namespace at
