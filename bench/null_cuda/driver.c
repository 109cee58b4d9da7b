/* A CUDA device that computes nothing: what PyTorch, Triton, cuBLAS and cuDNN call, answered on the host.
 *
 * Preloaded before PyTorch's CUDA build it stands in for the runtime (libcudart), the driver (libcuda), cuBLAS and
 * cuDNN. Kernels do nothing, and large copies neither, so every tensor holds zeros or what was there before. Real are
 * PyTorch's allocator and its statistics, the order of work, graphs and what a capture forbids, Triton's compiler and
 * launcher, and the time that the host takes. Addresses are of memory that is mapped and never touched.
 *
 *   NULL_CUDA_BYTES        of a device (default 141 GB)
 *   NULL_CUDA_DEVICES      how many there are (default 1); none may use what is another's
 *   NULL_CUDA_WORKSPACE    bytes that cuDNN asks for in each convolution (default 0)
 *   NULL_CUDA_TRACE        a file that every call which matters is written to, one a line; `.PID` is added
 *
 * Functions that are not here and that the libraries need return 0: `build.py` writes them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "driver_types.h"

#define API __attribute__((visibility("default")))
typedef int Status; /* 0 is success in all of these libraries */
enum { OUT_OF_MEMORY = 2, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_HANDLE = 400, ILLEGAL_STATE = 401 };
enum { MOST_DEVICES = 8 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void trace(const char *format, ...) {
  static FILE *file;
  static int known;
  if (!known) {
    const char *path = getenv("NULL_CUDA_TRACE");
    if (path) {
      char name[4096];
      snprintf(name, sizeof name, "%s.%d", path, getpid());
      file = fopen(name, "a");
    }
    known = 1;
  }
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&lock);
  vfprintf(file, format, arguments);
  fflush(file);
  pthread_mutex_unlock(&lock);
  va_end(arguments);
}

static size_t from_environment(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, 0, 10) : otherwise;
}

static size_t device_bytes(void) { return from_environment("NULL_CUDA_BYTES", 141 * 1000000000ull); }
static size_t workspace_bytes(void) { return from_environment("NULL_CUDA_WORKSPACE", 0); }

static int device_count(void) {
  size_t count = from_environment("NULL_CUDA_DEVICES", 1);
  return count < MOST_DEVICES ? count : MOST_DEVICES;
}

static __thread int this_device;
static __thread Status last_error;

static Status failed(Status why) {
  last_error = why;
  return why;
}

/* --- streams, events and what is captured --- */

typedef struct {
  int id, mode, invalid, ended, kernels;
  pthread_t owner;
} Capture;
typedef struct Stream {
  void *unused;
  Capture *capture;
  int priority, device;
  struct Stream *next;
} Stream;
typedef struct {
  Capture *capture;
  double at;
  int device;
} Event;

static Stream default_stream, *streams; /* every stream there is; they are never destroyed */
static Capture *current;                /* the last that was begun, until it ends */
static int captures;
static __thread int thread_mode; /* as cudaThreadExchangeStreamCaptureMode sets it: 0 global, 1 of the thread, 2 relaxed */

static Stream *stream_of(void *handle) { return (uintptr_t)handle < 16 ? &default_stream : handle; }

/* Of the current device, as all that a call is given has to be; the default stream is the current device's. */
static Status of_another_device(int device) {
  trace("of device %d where device %d is current\n", device, this_device);
  return failed(INVALID_HANDLE);
}
static int is_foreign(Stream *stream) { return stream != &default_stream && stream->device != this_device; }

static Status breaks(Capture *capture, Status why) {
  capture->invalid = 1;
  trace("breaks capture %d: error %d\n", capture->id, why);
  return failed(why);
}

/* The capture that a call breaks which is unsafe while one goes on. */
static Capture *broken_by_unsafe(void) {
  if (!current || thread_mode == 2 || current->mode == 2) return 0;
  if (current->mode == 1 && !pthread_equal(current->owner, pthread_self())) return 0;
  return current;
}

API Status cudaStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->priority = priority, stream->device = this_device;
  pthread_mutex_lock(&lock);
  stream->next = streams;
  streams = stream;
  pthread_mutex_unlock(&lock);
  *handle = stream;
  return 0;
}
API Status cudaStreamCreate(void **handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
API Status cudaStreamCreateWithFlags(void **handle, unsigned flags) { return cudaStreamCreate(handle); }
API Status cudaStreamGetPriority(void *handle, int *priority) { return *priority = stream_of(handle)->priority, 0; }
API Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }

API Status cudaStreamBeginCapture(void *handle, int mode) {
  Stream *stream = stream_of(handle);
  if (stream == &default_stream) return failed(CAPTURE_UNSUPPORTED);
  Capture *capture = calloc(1, sizeof *capture);
  *capture = (Capture){.id = ++captures, .mode = mode, .owner = pthread_self()};
  stream->capture = current = capture;
  trace("begin capture %d\n", capture->id);
  return 0;
}

API Status cudaStreamEndCapture(void *handle, void **graph) {
  Capture *capture = stream_of(handle)->capture;
  if (!capture) return failed(ILLEGAL_STATE);
  for (Stream *stream = streams; stream; stream = stream->next)
    if (stream->capture == capture) stream->capture = 0;
  capture->ended = 1;
  current = 0;
  trace("end capture %d: %d kernels%s\n", capture->id, capture->kernels, capture->invalid ? ", invalid" : "");
  *graph = capture->invalid ? 0 : capture;
  return capture->invalid ? failed(CAPTURE_INVALIDATED) : 0;
}

static int capture_status(Capture *capture) { return !capture ? 0 : capture->invalid ? 2 : 1; }

API Status cudaStreamIsCapturing(void *handle, int *status) {
  Stream *stream = stream_of(handle);
  Capture *broken = stream == &default_stream ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, CAPTURE_IMPLICIT);
  *status = capture_status(stream->capture);
  return 0;
}

API Status cudaStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id, void **graph, const void ***nodes,
                                    const void **edges, size_t *count) {
  Capture *capture = stream_of(handle)->capture;
  *status = capture_status(capture);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture;
  if (count) *count = 0;
  return 0;
}

API Status cudaThreadExchangeStreamCaptureMode(int *mode) {
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return 0;
}

/* Asks or waits for a stream: of one that is captured it breaks the capture; queries are unsafe for any. */
static Status asked(Stream *stream, int query) {
  if (stream->capture) return breaks(stream->capture, CAPTURE_UNSUPPORTED);
  Capture *broken = query || stream == &default_stream ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, query ? CAPTURE_UNSUPPORTED : CAPTURE_IMPLICIT);
  if (!query) trace("wait for a stream\n");
  return 0;
}
API Status cudaStreamQuery(void *handle) { return asked(stream_of(handle), 1); }
API Status cudaStreamSynchronize(void *handle) { return asked(stream_of(handle), 0); }
API Status cudaDeviceSynchronize(void) {
  if (current) return breaks(current, CAPTURE_UNSUPPORTED);
  trace("wait for the device\n");
  return 0;
}

API Status cudaEventCreateWithFlags(void **handle, unsigned flags) {
  Event *event = *handle = calloc(1, sizeof *event);
  event->device = this_device;
  return 0;
}
API Status cudaEventCreate(void **handle) { return cudaEventCreateWithFlags(handle, 0); }
API Status cudaEventRecord(void *handle, void *stream) {
  struct timespec now;
  Event *event = handle;
  Stream *on = stream_of(stream);
  if (event->device != (on == &default_stream ? this_device : on->device)) return of_another_device(event->device);
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->capture = on->capture, event->at = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  return 0;
}
API Status cudaEventRecordWithFlags(void *handle, void *stream, unsigned flags) { return cudaEventRecord(handle, stream); }
API Status cudaEventElapsedTime(float *ms, void *first, void *second) {
  double between = ((Event *)second)->at - ((Event *)first)->at;
  *ms = between > 1e-4 ? between : 1e-4;
  return 0;
}
static Status asked_event(Event *event, int query) {
  if (event->capture && !event->capture->ended) return breaks(event->capture, CAPTURED_EVENT);
  Capture *broken = query ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, CAPTURE_UNSUPPORTED);
  if (!query) trace("wait for an event\n");
  return 0;
}
API Status cudaEventQuery(void *event) { return asked_event(event, 1); }
API Status cudaEventSynchronize(void *event) { return asked_event(event, 0); }

/* A stream that waits for what is captured joins the capture; one that is captured may wait for nothing else. */
API Status cudaStreamWaitEvent(void *handle, void *event, unsigned flags) {
  Stream *stream = stream_of(handle);
  Capture *awaited = ((Event *)event)->capture;
  if (awaited && awaited->ended) awaited = 0;
  if (stream->capture && stream->capture != awaited) return breaks(stream->capture, CAPTURE_ISOLATION);
  if (awaited) stream->capture = awaited;
  return 0;
}
API Status cudaLaunchHostFunc(void *stream, void (*work)(void *), void *data) { return work(data), 0; }
API Status cudaStreamAddCallback(void *stream, void (*work)(void *, int, void *), void *data, unsigned flags) {
  return work(stream, 0, data), 0;
}

API Status cudaGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long flags) {
  return *instance = graph, 0;
}
API Status cudaGraphGetNodes(void *graph, void **nodes, size_t *count) { return *count = ((Capture *)graph)->kernels, 0; }
API Status cudaGraphLaunch(void *instance, void *stream) {
  Capture *graph = instance, *into = stream_of(stream)->capture;
  trace("launch graph %d: %d kernels\n", graph->id, graph->kernels);
  if (into) into->kernels += graph->kernels;
  return 0;
}

/* --- memory --- */

typedef struct Range {
  char *begin;
  size_t nbytes;
  int kind; /* as cudaMemoryType: 1 of the host, pinned; 2 of the device */
  int device;
  struct Range *next;
} Range;
static Range *ranges;
static size_t used[MOST_DEVICES];

static Status mapped(void **pointer, size_t nbytes, int kind) {
  Capture *broken = broken_by_unsafe();
  if (broken) return breaks(broken, CAPTURE_UNSUPPORTED);
  nbytes = nbytes ? nbytes : 1;
  pthread_mutex_lock(&lock);
  int fits = kind == 1 || used[this_device] + nbytes <= device_bytes();
  if (fits && kind == 2) used[this_device] += nbytes;
  pthread_mutex_unlock(&lock);
  trace("%s %zu of kind %d, %zu used\n", fits ? "allocate" : "no room for", nbytes, kind, used[this_device]);
  if (!fits) return failed(OUT_OF_MEMORY);
  Range *range = malloc(sizeof *range);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *range = (Range){mmap(0, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0), nbytes, kind, this_device};
  if (range->begin == MAP_FAILED) return free(range), failed(OUT_OF_MEMORY);
  pthread_mutex_lock(&lock);
  range->next = ranges;
  ranges = range;
  pthread_mutex_unlock(&lock);
  *pointer = range->begin;
  return 0;
}

static Status unmapped(void *pointer) {
  Capture *broken = pointer ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, CAPTURE_UNSUPPORTED);
  Range *found = 0;
  pthread_mutex_lock(&lock);
  for (Range **link = &ranges; *link && !found; link = found ? link : &(*link)->next)
    if ((*link)->begin == pointer) {
      found = *link;
      *link = found->next;
      if (found->kind == 2) used[found->device] -= found->nbytes;
    }
  pthread_mutex_unlock(&lock);
  if (!found) return pointer ? failed(INVALID_VALUE) : 0;
  munmap(found->begin, found->nbytes);
  trace("free %zu of kind %d, %zu used\n", found->nbytes, found->kind, used[found->device]);
  free(found);
  return 0;
}

/* Of no kind where it is not known: pageable memory of the host. */
static Range range_of(const void *pointer) {
  Range found = {0};
  pthread_mutex_lock(&lock);
  for (Range *range = ranges; range && !found.kind; range = range->next)
    if ((char *)pointer >= range->begin && (char *)pointer < range->begin + range->nbytes) found = *range;
  pthread_mutex_unlock(&lock);
  return found;
}
static int kind_of(const void *pointer) { return range_of(pointer).kind; }

API Status cudaMalloc(void **pointer, size_t nbytes) { return mapped(pointer, nbytes, 2); }
API Status cudaFree(void *pointer) { return unmapped(pointer); }
API Status cudaHostAlloc(void **pointer, size_t nbytes, unsigned flags) { return mapped(pointer, nbytes, 1); }
API Status cudaMallocHost(void **pointer, size_t nbytes) { return mapped(pointer, nbytes, 1); }
API Status cudaFreeHost(void *pointer) { return unmapped(pointer); }
API Status cudaMemGetInfo(size_t *left, size_t *total) {
  *total = device_bytes();
  *left = *total - used[this_device];
  return 0;
}
API Status cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  Range range = range_of(pointer);
  int kind = range.kind;
  *found = (struct cudaPointerAttributes){.type = kind, .device = range.device};
  if (kind) found->devicePointer = (void *)pointer;
  if (kind == 1) found->hostPointer = (void *)pointer;
  return 0;
}

static void count(Capture *capture) {
  if (capture) capture->kernels++;
}

/* Small copies are made, so that what the host reads back is what it wrote; large ones would touch the memory. */
static Status copied(void *to, const void *from, size_t nbytes, void *handle, int synchronous) {
  Capture *capture = stream_of(handle)->capture, *broken = synchronous ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, CAPTURE_UNSUPPORTED);
  int into = kind_of(to), out_of = kind_of(from);
  if (capture && !(into && out_of)) return breaks(capture, CAPTURE_UNSUPPORTED);
  count(capture);
  trace("copy%s %zu from kind %d to kind %d\n", capture ? " in a capture" : "", nbytes, out_of, into);
  if (capture) return 0;
  if (nbytes <= (into == 2 ? 1u << 20 : 1u << 26)) memcpy(to, from, nbytes);
  return 0;
}
API Status cudaMemcpy(void *to, const void *from, size_t nbytes, int kind) { return copied(to, from, nbytes, 0, 1); }
API Status cudaMemcpyAsync(void *to, const void *from, size_t nbytes, int kind, void *stream) {
  return copied(to, from, nbytes, stream, 0);
}
API Status cudaMemsetAsync(void *to, int value, size_t nbytes, void *stream) {
  Capture *capture = stream_of(stream)->capture;
  count(capture);
  if (!capture && nbytes <= 1 << 20) memset(to, value, nbytes);
  return 0;
}
API Status cudaMemset(void *to, int value, size_t nbytes) { return cudaMemsetAsync(to, value, nbytes, 0); }

/* --- the device: an H200's figures --- */

static int attribute(int name) {
  static const struct { int name, value; } known[] = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {9, 65536},
      {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {36, 3201000}, {37, 6144}, {38, 62914560}, {39, 2048}, {40, 3},
      {41, 1}, {75, 9}, {76, 0}, {81, 233472}, {82, 65536}, {95, 1}, {97, 232448}, {106, 32}, {111, 1024}, {115, 1},
  }; /* cudaDeviceAttr and CUdevice_attribute count alike */
  for (size_t k = 0; k < sizeof known / sizeof *known; k++)
    if (known[k].name == name) return known[k].value;
  return 0;
}
API Status cudaDeviceGetAttribute(int *value, int name, int device) { return *value = attribute(name), 0; }
API Status cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  *found = (struct cudaDeviceProp){.name = "NVIDIA H200", .totalGlobalMem = device_bytes(), .major = 9, .minor = 0};
  found->sharedMemPerBlock = attribute(8), found->regsPerBlock = attribute(12), found->warpSize = 32;
  found->maxThreadsPerBlock = 1024, found->multiProcessorCount = attribute(16), found->l2CacheSize = attribute(38);
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = attribute(5), found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048, found->maxBlocksPerMultiProcessor = 32, found->memoryBusWidth = 6144;
  found->sharedMemPerMultiprocessor = attribute(81), found->sharedMemPerBlockOptin = attribute(97);
  found->regsPerMultiprocessor = 65536, found->unifiedAddressing = 1, found->asyncEngineCount = 3;
  for (int k = 0; k < 16; k++) found->uuid.bytes[k] = k + 1 + device;
  return 0;
}
API Status cudaGetDeviceCount(int *found) { return *found = device_count(), 0; }
API Status cudaGetDevice(int *device) { return *device = this_device, 0; }
API Status cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return failed(INVALID_DEVICE);
  this_device = device;
  return 0;
}
API Status cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
API Status cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
API Status cudaGetLastError(void) {
  Status error = last_error;
  last_error = 0;
  return error;
}
API Status cudaPeekAtLastError(void) { return last_error; }
API const char *cudaGetErrorName(Status error) { return error ? "cudaErrorOfTheStandIn" : "cudaSuccess"; }
API const char *cudaGetErrorString(Status error) {
  switch (error) {
    case 0: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_IMPLICIT: return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "an error of the stand-in for CUDA";
  }
}
API Status cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64, .binaryVersion = 90, .ptxVersion = 90};
  found->maxDynamicSharedSizeBytes = attribute(97);
  return 0;
}
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int size, size_t shared) {
  return *blocks = 2, 0;
}
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size,
                                                                 size_t shared, unsigned flags) {
  return *blocks = 2, 0;
}

/* --- kernels, which do nothing --- */

static Status launched(const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, void *handle) {
  Stream *stream = stream_of(handle);
  Capture *broken = stream == &default_stream && !stream->capture ? broken_by_unsafe() : 0;
  if (broken) return breaks(broken, CAPTURE_IMPLICIT);
  if (is_foreign(stream)) return of_another_device(stream->device);
  count(stream->capture);
  trace("kernel%s %s grid %u,%u,%u block %u\n", stream->capture ? " in a capture" : "", name, x, y, z, threads);
  return 0;
}

typedef struct Kernel {
  const void *function;
  const char *name;
  struct Kernel *next;
} Kernel;
static Kernel *kernels[1 << 14]; /* by address */

static Kernel **place_of(const void *function) { return &kernels[((uintptr_t)function >> 4) % (1 << 14)]; }

API void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[2];
  return handle;
}
API void __cudaRegisterFunction(void **binary, const char *function, char *device, const char *name, int limit, void *a,
                                void *b, void *c, void *d, int *e) {
  Kernel *kernel = malloc(sizeof *kernel);
  pthread_mutex_lock(&lock);
  *kernel = (Kernel){function, name, *place_of(function)};
  *place_of(function) = kernel;
  pthread_mutex_unlock(&lock);
}
static const char *name_of(const void *function) {
  for (Kernel *kernel = *place_of(function); kernel; kernel = kernel->next)
    if (kernel->function == function) return kernel->name;
  return "?";
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configurations[16];
static __thread int depth;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configurations[depth].grid = grid, configurations[depth].block = block;
  configurations[depth].shared = shared, configurations[depth++].stream = stream;
  return 0;
}
API Status __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  depth--;
  *grid = configurations[depth].grid, *block = configurations[depth].block;
  *shared = configurations[depth].shared, *stream = configurations[depth].stream;
  return 0;
}
API Status __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)function, 0; }
API Status cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
  return launched(name_of(function), grid.x, grid.y, grid.z, block.x * block.y * block.z, stream);
}
API Status __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
API Status cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                       void *stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}
API Status cudaLaunchKernelExC(const struct cudaLaunchConfig_st *how, const void *function, void **arguments) {
  return cudaLaunchKernel(function, how->gridDim, how->blockDim, arguments, 0, how->stream);
}

/* --- the driver, which Triton launches by --- */

typedef unsigned long long Address;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} LaunchConfiguration; /* CUlaunchConfig */

API Status cuInit(unsigned flags) { return 0; }
API Status cuDriverGetVersion(int *version) { return *version = 13000, 0; }
API Status cuDeviceGetCount(int *found) { return *found = device_count(), 0; }
API Status cuDeviceGet(int *device, int number) { return *device = number, 0; }
API Status cuDeviceGetAttribute(int *value, int name, int device) { return *value = attribute(name), 0; }
API Status cuDeviceTotalMem_v2(size_t *nbytes, int device) { return *nbytes = device_bytes(), 0; }
API Status cuCtxGetCurrent(void **context) { return *context = (void *)(uintptr_t)(this_device + 1), 0; }
API Status cuCtxSetCurrent(void *context) { return context ? cudaSetDevice((uintptr_t)context - 1) : 0; }
API Status cuCtxGetDevice(int *device) { return *device = this_device, 0; }
API Status cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(uintptr_t)(device + 1), 0; }
API Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
API Status cuGetErrorString(Status error, const char **text) { return *text = cudaGetErrorString(error), 0; }
API Status cuModuleLoadData(void **module, const void *image) { return *module = (void *)image, 0; }
API Status cuModuleGetFunction(void **function, void *module, const char *name) { return *function = strdup(name), 0; }
API Status cuFuncGetAttribute(int *value, int name, void *function) { return *value = name == 0 ? 1024 : name == 4 ? 64 : 0, 0; }
API Status cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *how) { return *clusters = 66, 0; }
API Status cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                          unsigned shared, void *stream, void **arguments, void **extra) {
  return launched(function, x, y, z, a * b * c, stream);
}
API Status cuLaunchKernelEx(const LaunchConfiguration *how, void *function, void **arguments, void **extra) {
  return launched(function, how->grid[0], how->grid[1], how->grid[2], how->block[0], how->stream);
}
API Status cuPointerGetAttribute(void *value, int name, Address pointer) {
  Range range = range_of((void *)pointer);
  if (name != 3) return *(int *)value = 0, 0;
  if (!range.kind) return INVALID_VALUE; /* of the host: Triton says so */
  if (range.kind == 2 && range.device != this_device) return of_another_device(range.device);
  *(Address *)value = pointer;
  return 0;
}

static int nothing(void) { return 0; }
API Status cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status) {
  char second[256];
  snprintf(second, sizeof second, "%s_v2", name);
  void *found = dlsym(RTLD_DEFAULT, name);
  found = found ? found : dlsym(RTLD_DEFAULT, second);
  *function = found ? found : (void *)nothing;
  if (status) *status = 0;
  return 0;
}

/* --- cuBLAS: a handle holds its stream --- */

typedef struct {
  void *stream;
} Handle;
typedef struct {
  uint64_t rows, columns;
} Layout;

API Status cublasCreate_v2(Handle **handle) { return *handle = calloc(1, sizeof **handle), 0; }
API Status cublasSetStream_v2(Handle *handle, void *stream) { return handle->stream = stream, 0; }
API Status cublasGetMathMode(Handle *handle, int *mode) { return *mode = 0, 0; }
API Status cublasGetPointerMode_v2(Handle *handle, int *mode) { return *mode = 0, 0; }

static Status multiplied(const char *name, uint64_t m, uint64_t n, uint64_t k, void *stream) {
  char text[128];
  snprintf(text, sizeof text, "%s %lu x %lu x %lu", name, m, n, k);
  return launched(text, 1, 1, 1, 1, stream);
}
#define PRODUCT(name) \
  API Status name(Handle *handle, int ta, int tb, int m, int n, int k, ...) { \
    return multiplied(#name, m, n, k, handle->stream); \
  }
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)

API Status cublasLtMatmulDescCreate(void **description, int a, int b) { return *description = calloc(1, 64), 0; }
API Status cublasLtMatmulPreferenceCreate(void **preference) { return *preference = calloc(1, 64), 0; }
API Status cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *layout = malloc(sizeof **layout);
  **layout = (Layout){rows, columns};
  return 0;
}
API Status cublasLtMatmulAlgoGetHeuristic(void *handle, void *op, void *a, void *b, void *c, void *d, void *preference,
                                          int wanted, void *results, int *found) {
  memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: no workspace, success */
  *found = 1;
  return 0;
}
API Status cublasLtMatmul(void *handle, void *op, const void *alpha, const void *a, Layout *of_a, const void *b,
                          Layout *of_b, const void *beta, const void *c, Layout *of_c, void *d, Layout *of_d,
                          const void *algorithm, void *workspace, size_t nbytes, void *stream) {
  uint64_t k = of_a->rows == of_d->rows ? of_a->columns : of_a->rows;
  return multiplied("cublasLtMatmul", of_d->rows, of_d->columns, k, stream);
}

/* --- cuDNN: its graph API, one engine for whatever is asked --- */

enum { OPERATION_FORWARD = 10, OPERATION_BACKWARD = 12, TENSOR = 17 };
enum { HEURISTIC_RESULTS = 202, CONFIGURATION_ENGINE = 300, PLAN_WORKSPACE = 402, FORWARD_W = 703, FORWARD_X = 704, DIMENSIONS = 902 };
enum { TYPE_INT64 = 3, TYPE_DESCRIPTOR = 15 };

typedef struct Descriptor {
  int type, count;
  int64_t dimensions[8];
  struct Descriptor *x, *w, *held[8];
} Descriptor;

API Status cudnnCreate(Handle **handle) { return *handle = calloc(1, sizeof **handle), 0; }
API Status cudnnSetStream(Handle *handle, void *stream) { return handle->stream = stream, 0; }
API Status cudnnGetStream(Handle *handle, void **stream) { return *stream = handle->stream, 0; }
API size_t cudnnGetVersion(void) { return 91900; }
API size_t cudnnGetCudartVersion(void) { return 13000; }
API Status cudnnGetProperty(int part, int *value) { return *value = part == 0 ? 9 : part == 1 ? 19 : 0, 0; }

API Status cudnnBackendCreateDescriptor(int type, Descriptor **made) {
  *made = calloc(1, sizeof **made);
  (*made)->type = type;
  return 0;
}
API Status cudnnBackendSetAttribute(Descriptor *of, int name, int type, int64_t count, const void *values) {
  if (name == DIMENSIONS && count <= 8) memcpy(of->dimensions, values, 8 * count);
  if (type != TYPE_DESCRIPTOR) return 0;
  Descriptor *const *given = values;
  for (int k = 0; k < count && of->count < 8; k++) of->held[of->count++] = given[k];
  if (name == FORWARD_W) of->w = given[0];
  if (name == FORWARD_X) of->x = given[0];
  return 0;
}
API Status cudnnBackendGetAttribute(Descriptor *of, int name, int type, int64_t wanted, int64_t *found, void *values) {
  int64_t count = 0;
  if (type == TYPE_INT64) {
    count = 1;
    if (values && wanted > 0) *(int64_t *)values = name == PLAN_WORKSPACE ? (int64_t)workspace_bytes() : 0;
  } else if (type == TYPE_DESCRIPTOR && (name == HEURISTIC_RESULTS || name == CONFIGURATION_ENGINE)) {
    count = 1;
    Descriptor *result = name == HEURISTIC_RESULTS && values && wanted > 0 ? *(Descriptor **)values : 0;
    if (result) result->held[0] = of->held[0], result->count = 1; /* so that a plan knows its operation */
  }
  if (found) *found = count;
  return 0;
}
static Descriptor *held_by(Descriptor *of, int type, int deep) {
  if (!of || of->type == type || deep > 6) return of && of->type == type ? of : 0;
  Descriptor *found = 0;
  for (int k = 0; k < of->count && !found; k++) found = held_by(of->held[k], type, deep + 1);
  return found;
}
API Status cudnnBackendExecute(Handle *handle, Descriptor *plan, Descriptor *pack) {
  char text[256] = "cudnn ?";
  Descriptor *forward = held_by(plan, OPERATION_FORWARD, 0), *backward = held_by(plan, OPERATION_BACKWARD, 0);
  int64_t *x = forward && forward->x ? forward->x->dimensions : 0, *w = forward && forward->w ? forward->w->dimensions : 0;
  if (x && w)
    snprintf(text, sizeof text, "cudnn convolution %ldx%ldx%ldx%ld by %ldx%ldx%ldx%ld", x[0], x[1], x[2], x[3], w[0], w[1],
             w[2], w[3]);
  else if (backward)
    snprintf(text, sizeof text, "cudnn transposed convolution");
  return launched(text, 1, 1, 1, 1, handle->stream);
}
