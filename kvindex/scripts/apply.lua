-- Applies one sequenced batch of a publisher, with count and digest, or nothing of it.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, sequence, stored hashes, removed hashes (8 bytes each)
-- Returns  {count, digest} of the slot, also for a batch applied before; false if the slot is not this
--          incarnation's or a sequence is missing

local slot, incarnation, sequence, stored, removed = unpack(ARGV)
slot, sequence = tonumber(slot), tonumber(sequence)
local state = own(slot, incarnation)
if not state or sequence > state[2] + 1 then
  return false
end
local count, digest = tonumber(state[3]), state[4]
if sequence <= tonumber(state[2]) then
  return {count, digest}
end

if stored == '' then
  write_though_full()
end
local directory = redis.call('HMGET', DIRECTORY, 'buckets', 'entries')
local num_buckets, num_entries = tonumber(directory[1]), tonumber(directory[2]) or 0
if not num_buckets then
  return false
end
local power = power_within(num_buckets)
local low, high = unpack_from('<I4I4', digest)
local mine = set_of(slot)

-- Few sets occur in a batch, so each is converted once.
local with_slot, without_slot = {}, {}

for at = 1, #stored, 8 do
  local hash = stored:sub(at, at + 7)
  local key = bucket_key(bucket_of(hash, num_buckets, power))
  local set = redis.call('HGET', key, hash) or ''
  local changed = with_slot[set]
  if not changed then
    changed = to_set(union(to_words(set), mine))
    with_slot[set] = changed
  end
  if changed ~= set then
    redis.call('HSET', key, hash, changed)
    if set == '' then
      num_entries = num_entries + 1
    end
    local hash_low, hash_high = unpack_from('<I4I4', hash)
    low, high, count = bxor(low, hash_low), bxor(high, hash_high), count + 1
  end
end

for at = 1, #removed, 8 do
  local hash = removed:sub(at, at + 7)
  local key = bucket_key(bucket_of(hash, num_buckets, power))
  local set = redis.call('HGET', key, hash) or ''
  local changed = without_slot[set]
  if not changed then
    changed = to_set(without(to_words(set), mine))
    without_slot[set] = changed
  end
  if changed ~= set then
    if changed == '' then
      redis.call('HDEL', key, hash)
      num_entries = num_entries - 1
    else
      redis.call('HSET', key, hash, changed)
    end
    local hash_low, hash_high = unpack_from('<I4I4', hash)
    low, high, count = bxor(low, hash_low), bxor(high, hash_high), count - 1
  end
end

if #removed > 0 then
  redis.call('XADD', REMOVALS, 'MAXLEN', '~', LOG_REMOVALS, '*', 'slot', slot, 'incarnation', incarnation,
    'blocks', removed)
end

local function split_next()
  local source = bucket_key(num_buckets - power)
  local moving, moved = {}, {}
  local flat = redis.call('HGETALL', source)
  for at = 1, #flat, 2 do
    local hash = flat[at]
    if unpack_from('<I4', hash) % (2 * power) == num_buckets then
      moving[#moving + 1] = hash
      moved[#moved + 1] = hash
      moved[#moved + 1] = flat[at + 1]
    end
  end
  if #moving > 0 then
    redis.call('HDEL', source, unpack(moving))
    redis.call('HSET', bucket_key(num_buckets), unpack(moved))
  end
  num_buckets = num_buckets + 1
  power = power_within(num_buckets)
end

-- One split for each bucketful of stores keeps up with any growth; one more catches up.
local num_splits = floor(#stored / 8 / ENTRIES_PER_BUCKET) + 1
while num_splits > 0 and num_entries > ENTRIES_PER_BUCKET * num_buckets do
  split_next()
  num_splits = num_splits - 1
end

digest = pack('<I4I4', low % WORD, high % WORD)
redis.call('HSET', DIRECTORY, 'buckets', num_buckets, 'entries', num_entries)
redis.call('HSET', SLOT .. slot, 'sequence', sequence, 'count', count, 'digest', digest)
return {count, digest}
