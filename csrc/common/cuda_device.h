// What the bindings (.cpp, no CUDA headers) ask of the device; implemented in device_cuda.cu.
#pragma once

extern "C" {
// Multiprocessors of the current device; 0 when there is none.
int mmk_multiprocessors();
// Bytes of shared memory that a block of the current device may ask for; 0 when there is none.
int mmk_shared_memory();
// The major number of the current device's compute capability; 0 when there is none.
int mmk_capability();
// What a launcher's non-zero result means.
const char* mmk_launch_error(int code);
}
