-- Reads the entries of a slice of buckets. Writes nothing.
--
-- KEYS[1]  directory of the pool
-- ARGV     first bucket, most buckets to read
-- Returns  {number of buckets; next bucket, or -1 behind the last; {set of slots, hashes that they hold,
--          8 bytes each}...; what `fleet` returns}

-- Bounds the call where buckets are fuller than they should be.
local MOST_ENTRIES = 4096

local bucket, budget = tonumber(ARGV[1]), tonumber(ARGV[2])
local num_buckets = tonumber(redis.call('HGET', DIRECTORY, 'buckets')) or 0
local stop = math.min(bucket + budget, num_buckets)
local num_entries = 0
local hashes_of = {}

while bucket < stop and num_entries < MOST_ENTRIES do
  local flat = redis.call('HGETALL', bucket_key(bucket))
  for at = 1, #flat, 2 do
    if #flat[at] == HASH_BYTES then
      local hashes = hashes_of[flat[at + 1]] or {}
      hashes[#hashes + 1] = flat[at]
      hashes_of[flat[at + 1]] = hashes
    end
  end
  num_entries = num_entries + #flat / 2
  bucket = bucket + 1
end

local held = {}
for set, hashes in pairs(hashes_of) do
  held[#held + 1] = set
  held[#held + 1] = table.concat(hashes)
end
return {num_buckets, bucket < num_buckets and bucket or -1, held, fleet(now_ms())}
